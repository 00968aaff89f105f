"""Presets by name: pages from docstrings, keyword checks, mixes, modifiers, compat, plugins."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.core import Bco, CandidateLogps, ForwardKL, Objective, Preference, presets
from mmalign.core.links import Bernoulli, Nca
from mmalign.core.presets import ALIASES, PRESETS
from mmalign.core.score import Score
from mmalign.core.weights import reweight
from mmalign.errors import ConfigError, NeedsError


def batch(rows: int = 3, candidates: int = 2, seed: int = 0) -> CandidateLogps:
    shape = (rows, candidates, 5)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(5) < torch.randint(1, 6, shape[:2], generator=generator).unsqueeze(-1)
    labels = torch.zeros(shape[:2], dtype=torch.float64)
    labels[:, 0] = 1.0
    return CandidateLogps(
        policy=draw().requires_grad_(),
        reference=draw(),
        mask=mask,
        labels=labels,
        kl=-draw(),
        weight=-draw(),
        log_sum_p2=draw() - 0.5,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_docstring_is_a_page(name: str) -> None:
    """Title, a formula, every keyword, a source and what departs: `objectives NAME` prints them."""
    function = PRESETS[name]
    doc = inspect.getdoc(function)
    assert doc is not None
    title, *rest = doc.splitlines()
    assert title.endswith(".")
    assert rest[0] == ""
    assert re.search(r"^loss = ", doc, re.M)
    assert re.search(r"^Source: \S", doc, re.M)
    assert re.search(r"^Departs: \S", doc, re.M)
    keywords = list(inspect.signature(function).parameters)
    described = re.search(r"^Args:\n((?:    .*\n|\n)*)", doc, re.M)
    names = re.findall(r"^    (\w+): \S", described[1], re.M) if described else []
    assert names == keywords


@pytest.mark.parametrize("name", PRESETS)
def test_name_is_the_functions_name(name: str) -> None:
    assert PRESETS[name].__name__ == name
    assert getattr(presets, name) is PRESETS[name]


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n]().needs.rows == "pair"])
def test_needs_say_whether_label_values_matter(name: str) -> None:
    objective = presets.build(name).eval()
    logps = batch(candidates=max(2, objective.needs.candidates))
    logps = logps.replace(prompt=logps.policy, prompt_mask=logps.mask)
    tied = logps.labels.clone()
    tied[:, :2] = 0.5
    moved = float(objective(logps.replace(labels=tied)).value) != float(objective(logps).value)
    assert moved == objective.needs.labels


def test_aliases_lead_to_presets() -> None:
    assert not set(ALIASES) & set(PRESETS)
    for alias, name in ALIASES.items():
        assert presets.preset(alias) is PRESETS[name]


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"objective.name is 'tdpo_2'.*Did you mean 'tdpo2'"):
        presets.build("tdpo_2")


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("dpo", {"betta": 0.1}, r"objective.betta is not a keyword of 'dpo'. Did you mean 'beta'"),
        ("dpo", {"beta": "0.1"}, r"objective.beta is '0.1'; it must be a number"),
        ("dpo", {"beta": "1e-3"}, r"objective.beta is '1e-3'; it must be a number"),
        ("rdpo", {"divergence": {"name": "js", "alpha": 0.3}}, "'js' has no such parameter"),
        ("rdpo", {"divergence": {"name": "alpha", "alpha": "x"}}, r"objective.divergence.alpha is"),
        ("rdpo", {"divergence": {"alpha": 0.3}}, "objective.divergence has no name"),
        ("rdpo", {"divergence": "js", "alpha": "x"}, "objective.alpha is 'x'; it must be a number"),
        ("rdpo", {"divergence": 3}, "it must be a name or a section of keys or a Transform"),
        ("dpo", {"beta": True}, r"objective.beta is True; it must be a number"),
        ("dpo", {"beta": 0.0}, r"objective.beta is 0.0; it must be above 0"),
        ("dpo", {"beta": float("nan")}, r"objective.beta is nan"),
        ("dpo", {"compat": "trl-1.16"}, r"objective.compat is given, but .* 'dpo' agree"),
        ("ipo", {"compat": "trl"}, r"must be 'trl-1.16' or 'official' or null"),
        ("ipo", {"reduce": "median"}, r"objective.reduce is 'median'; it must be 'sum' or 'mean'"),
        ("ipo", {"tau": -1.0}, r"objective.tau is -1.0"),
        ("rdpo", {"flip": 0.5}, r"objective.flip is 0.5; it must be in \[0, 0.5\)"),
        ("exo", {"flip": 0.0}, r"objective.flip is 0.0; it must be in \(0, 0.5\]"),
        ("hypo", {"samples": 1}, r"objective.samples is 1; it must be at least 2"),
        ("hypo", {"samples": 2.5}, r"objective.samples is 2.5; it must be a whole number"),
        ("kto", {"divergence": "js"}, r"'kto' is defined for its own score only.*reverse KL"),
        ("kto", {"ld_alpha": 0.5}, r"defined for pairs; this loss rates single responses"),
        ("kto", {"wpo": True}, r"defined for pairs; this loss rates single responses"),
        ("sft", {"wpo": True}, r"act on pairs, but this objective does not read any"),
        ("aot", {"wpo": True}, r"wpo weighs pairs, but Aot compares responses of different rows"),
        ("bco", {"wpo": True}, r"wpo weighs pairs, but Bco"),
        ("bco", {"rows": "unpaired", "ld_alpha": 0.5}, r"defined for pairs; this loss"),
        ("plackett_luce", {"ld_alpha": 0.5}, r"PlackettLuce does not read"),
        ("orpo", {"ld_alpha": 0.5}, r"ld_alpha is not defined on log-odds"),
        ("dpo", {"ld_alpha": 1.5}, r"objective.ld_alpha is 1.5; it must be in \[0, 1\]"),
        ("dpo", {"ld_alpha": "x"}, r"objective.ld_alpha is 'x'; it must be a number"),
        ("dpo", {"wpo": {"clamp": 1}}, r"objective.wpo has unknown keys \['clamp'\]"),
        ("dpo", {"wpo": {"clamp_max": 0.0}}, r"objective.wpo.clamp_max is 0.0"),
        ("dpo", {"wpo": "yes"}, r"objective.wpo is 'yes'"),
        ("sparse_po", {"l1_kl": -1.0}, r"objective.l1_kl is -1.0"),
        ("simpo", {"link": "hinge", "label_smoothing": 0.1}, r"label_smoothing is 0.1"),
        ("simpo", {"link": "exo"}, r"objective.link is 'exo'; it must be 'sigmoid' or 'hinge'"),
        ("sft", {"reduce": "token"}, r"objective.reduce is 'token'"),
        ("discopop", {"tau": 0.0}, r"objective.tau is 0.0"),
        ("chi_po", {"r_max": 0.0}, r"objective.r_max is 0.0"),
        ("no_such_package.losses:mine", {}, r"'no_such_package.losses' cannot be imported"),
        ("math:no_such", {}, r"'math' has no such function"),
    ],
)
def test_bad_keywords_say_what_where_and_what_to_do(
    name: str, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        presets.build(name, **keywords)


@pytest.mark.parametrize("link", [Nca(), Bernoulli()])
def test_single_response_links_need_reverse_kl(link: Any) -> None:
    with pytest.raises(ConfigError, match=r"looks at one response alone.*unknown constant"):
        Objective(Preference(Score(0.1, ForwardKL()), link))


def test_single_response_terms_need_reverse_kl() -> None:
    with pytest.raises(ConfigError, match="Bco looks at one response alone"):
        Objective(Bco(Score(0.1, ForwardKL())))
    with pytest.raises(ConfigError, match="reverse KL only"):
        Score((0.1, 0.2), ForwardKL())


def test_users_function_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_losses.py").write_text(
        textwrap.dedent("""
            from __future__ import annotations
            from typing import TYPE_CHECKING
            from mmalign.core import Objective, Preference, Score, links
            if TYPE_CHECKING:
                from somewhere import Number

            def mine(beta: Number, scale: float = 1.0) -> Objective:
                return Objective(Preference(Score(beta * scale), links.Logistic()))

            def none() -> None:
                return None

            def free(**options: float) -> Objective:
                return mine(options["beta"])
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    expected = presets.dpo(0.2)(batch()).value
    assert presets.build("users_losses:mine", beta=0.1, scale=2.0)(batch()).value == expected
    assert presets.build("users_losses:free", beta=0.2)(batch()).value == expected
    with pytest.raises(ConfigError, match=r"'users_losses:none', but it returned None"):
        presets.build("users_losses:none")
    with pytest.raises(ConfigError, match=r"objective.beta is missing; 'users_losses:mine'"):
        presets.build("users_losses:mine")
    with pytest.raises(ConfigError, match=r"objective.scael is not a keyword.*'scale'"):
        presets.build("users_losses:mine", beta=0.1, scael=1.0)
    sys.modules.pop("users_losses")


def test_mix_is_the_weighted_sum() -> None:
    c = batch()
    mixed = presets.build_mix({"dpo": 1.0, "sft": {"weight": 0.1, "reduce": "mean"}})
    parts = presets.dpo()(c).value + 0.1 * presets.sft("mean")(c).value
    loss = mixed(c)
    torch.testing.assert_close(loss.value, parts)
    assert mixed.needs.reference
    assert mixed.needs.rows == "pair"
    names = {"loss", "loss/dpo", "loss/sft"}
    assert names <= set(loss.metrics)
    torch.testing.assert_close(
        loss.metrics["loss/dpo"] + loss.metrics["loss/sft"], loss.metrics["loss"]
    )


def test_mix_of_methods_with_several_terms_names_each() -> None:
    mixed = presets.build_mix({"mpo": 0.5, "orpo": 0.5, "bco": 0.25})
    assert set(mixed.terms) == {
        "mpo/preference", "mpo/bco", "mpo/nll", "orpo/preference", "orpo/nll", "bco",
    }  # fmt: skip
    c = batch()
    parts = (presets.mpo(), presets.orpo(), presets.bco())
    values = [part(c).value for part in parts]
    torch.testing.assert_close(mixed(c).value, 0.5 * values[0] + 0.5 * values[1] + 0.25 * values[2])
    assert set(mixed.state_dict()) == {
        f"states.{name}.{buffer}" for name in ("mpo_bco", "bco") for buffer in ("mean", "count")
    }


def test_mix_that_cannot_share_rows_is_refused() -> None:
    with pytest.raises(NeedsError, match="different kinds of rows"):
        presets.build_mix({"dpo": 1.0, "kto": 1.0})
    with pytest.raises(NeedsError, match="different extra candidates"):
        presets.build_mix({"vpo": 1.0, "rationale": 1.0})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "objective.mix is empty"),
        ({"dpo": "1"}, "objective.mix.dpo"),
        ({"dpo": {"weight": "x"}}, r"objective.mix.dpo.weight is 'x'; it must be a number"),
        ({"dpoo": 1.0}, "Did you mean 'dpo'"),
        ({"dpo": {"weight": 1.0, "bta": 1}}, "objective.bta is not a keyword"),
    ],
)
def test_bad_mixes(mix: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        presets.build_mix(mix)


@dataclass
class Section:
    """What the configuration's `objective` section looks like to the core."""

    name: str | None = None
    mix: dict[str, Any] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def test_from_config_builds_either_form() -> None:
    c = batch()
    named = presets.from_config(Section("f_dpo", keywords={"divergence": "js", "beta": 0.2}))
    assert torch.equal(named(c).value, presets.f_dpo("js", 0.2)(c).value)
    mixed = presets.from_config(Section(mix={"dpo": 1, "sft": 0.1}, keywords={"ld_alpha": 0.3}))
    assert mixed.terms["dpo"].score.ld_alpha == 0.3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"objective.beta is given beside `mix`"):
        presets.from_config(Section(mix={"dpo": 1}, keywords={"beta": 0.2}))
    with pytest.raises(ConfigError, match="neither"):
        presets.from_config(Section())


LD = [n for n in PRESETS if n in (
    "dpo", "f_dpo", "ipo", "hinge", "rdpo", "exo", "simpo", "cpo", "tdpo2", "sparse_po", "aot",
    "aot_unpaired", "bco", "kto_pair", "mpo", "rpo", "vpo", "nca", "sppo", "rrpo", "rationale",
)]  # fmt: skip


@pytest.mark.parametrize("name", LD)
def test_ld_alpha_of_one_changes_nothing_and_zero_forgets_the_tail(name: str) -> None:
    c = batch(4, 4)
    plain = presets.build(name)(c).value
    torch.testing.assert_close(presets.build(name, ld_alpha=1.0)(c).value, plain)
    assert presets.build(name, ld_alpha=0.3)(c).value.item() != pytest.approx(
        plain.item(), rel=1e-6
    )


def test_ld_alpha_weighs_the_tail_exactly() -> None:
    c = batch(5)
    length = c.mask.sum(-1).amin(1)
    tail = torch.arange(5) >= length[:, None, None]
    weight = 1.0 - 0.7 * tail.double()
    by_hand = presets.dpo()(c.replace(weight=weight)).value
    ours = presets.build("dpo", ld_alpha=0.3)(c.replace(weight=None)).value
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=0.0)


WEIGHED = [n for n in PRESETS if n in (
    "dpo", "f_dpo", "ipo", "simpo", "nca", "apo_zero", "tdpo1", "orpo", "sppo", "rpo", "mdpo",
)]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHED)
def test_wpo_weighs_the_preference_rows_only(name: str) -> None:
    c = batch(4, 4)
    plain = presets.build(name)
    weighed = presets.build(name, wpo={"clamp_max": 0.7})
    assert weighed.needs.log_sum_p2
    assert c.log_sum_p2 is not None
    likeness = torch.where(c.mask, c.policy - c.log_sum_p2, 0.0).sum(-1) / c.mask.sum(-1)
    for label, term in plain.terms.items():
        rows = term(c)
        pair = (0, 2) if label == "preference_2" else (0, 1)
        if label in ("preference", "preference_2"):
            rows = rows * likeness[:, pair].sum(1).exp().clamp(max=0.7).detach()
        torch.testing.assert_close(weighed.terms[label](c), rows)


def test_a_mix_takes_modifiers_on_its_pairs() -> None:
    mixed = presets.build_mix({"dpo": 2.0, "sft": 0.5}, wpo=True)
    c = batch()
    expected = 2.0 * presets.wpo()(c).value + 0.5 * presets.sft()(c).value
    torch.testing.assert_close(mixed(c).value, expected)
    again = reweight(presets.build_mix({"dpo": 2.0, "sft": 0.5}), ld_alpha=0.5)
    expected = 2.0 * presets.build("dpo", ld_alpha=0.5)(c).value + 0.5 * presets.sft()(c).value
    torch.testing.assert_close(again(c).value, expected)


@pytest.mark.parametrize("name", [n for n in PRESETS if "compat" in
                                  inspect.signature(PRESETS[n]).parameters])  # fmt: skip
def test_compat_changes_something(name: str) -> None:
    """A compat option that changed nothing would be a dead one."""
    alpha = {"divergence": "alpha", "alpha": 0.3}
    keywords = {**dict.fromkeys(("f_dpo", "hinge", "rdpo", "exo", "discopop"), alpha),
                "ipo": {"divergence": "js"}, "sigmoid_norm": {"divergence": "js"}}  # fmt: skip
    annotation = str(inspect.signature(PRESETS[name]).parameters["compat"].annotation)
    c = batch(6)
    if name == "orpo":
        c = c.replace(prompt=c.policy.detach() - 1.0, prompt_mask=c.mask)
    if name == "kto_pair":  # a positive baseline, so that its gradient exists
        c = c.replace(reference=c.policy.detach() - 0.5)
    for compat in ("trl-1.16", "official"):
        if compat not in annotation:
            continue
        ours = presets.build(name, **keywords.get(name, {}))(c)
        theirs = presets.build(name, compat=compat, **keywords.get(name, {}))(c)
        seen = [(loss.value, loss.rewards) for loss in (ours, theirs)]
        grads = [torch.autograd.grad(loss.value, c.policy)[0] for loss in (ours, theirs)]
        same = all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*seen, strict=True))
        assert not (same and torch.allclose(*grads, atol=1e-9))
