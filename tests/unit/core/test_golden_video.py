"""Loss-level cases of golden/video.json; documented quirks of released code must differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import Tokens, compare, fold, gradient, load, log_softmax, tensor, unfold
from torch import Tensor

from mmalign.core import CandidateLogps, Objective, presets
from mmalign.core.numerics import over_positions

GOLDEN = load("video")
TOL = 1e-10

ELSEWHERE = {
    "diff_spans": "tests/unit/text/test_token_spans.py",
    "mask_tags": "tests/unit/data/test_spans.py",
}
HERE = {"rrpo", "adpo", "pami_vdpo", "family"}


def test_every_group_is_tested_or_explained() -> None:
    about = {"version", "dtype", "generated_with", "tolerance"}
    assert HERE | set(ELSEWHERE) | about == set(GOLDEN)


def named(group: str, *, quirk: bool = False) -> pytest.MarkDecorator:
    wanted = [case for case in GOLDEN[group] if ("quirk" in case["kind"]) == quirk]
    assert wanted
    return pytest.mark.parametrize("case", wanted, ids=[case["name"] for case in wanted])


def spans(case: dict[str, Any]) -> Tensor:
    ids = torch.tensor(case["inputs"]["span_ids"])[:, 1:]
    return fold((ids > 0).double())


def rrpo(case: dict[str, Any]) -> Objective:
    return presets.rrpo(case["beta"], case["alpha"])


@named("rrpo")
def test_rrpo(case: dict[str, Any]) -> None:
    tokens = Tokens(case["inputs"])
    batch = tokens.batch(weight=spans(case))
    loss = rrpo(case)(batch)
    assert loss.rewards is not None
    assert loss.rows is not None
    kl = over_positions(batch.kl, batch.mask)
    logps = over_positions(batch.policy, batch.mask)
    got = {
        "losses": loss.rows,
        "loss": loss.value,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "chosen_kl": kl[:, 0],
        "rejected_kl": kl[:, 1],
        "chosen_logps": logps[:, 0],
        "rejected_logps": logps[:, 1],
        "reward_accuracy": (loss.rewards[:, 0] > loss.rewards[:, 1]).double(),
        "grad_logits": gradient(loss, tokens.logits)[0],
    }
    # At equal policies the release's log(softmax) differs from itself by rounding, and wins.
    equal = case["inputs"]["policy_logits"] == case["inputs"]["ref_logits"]
    noise = {"reward_accuracy": "rounding"} if equal else {}
    compare(case["expected"], got, tol=TOL, skip=noise)


def test_rrpo_gives_no_gradient_outside_rejected_spans() -> None:
    case = GOLDEN["rrpo"][0]
    tokens, weight = Tokens(case["inputs"]), spans(GOLDEN["rrpo"][0])
    loss = rrpo(case)(tokens.batch(weight=weight))
    grad = gradient(loss, tokens.logits)[0].chunk(2)[1][:, :-1]  # [B, T - 1, V] rejected
    outside = weight[:, 1] == 0
    assert outside.any()
    assert grad[outside].abs().max() == 0.0
    assert grad[~outside].abs().max() > 0.0


def test_rrpo_refuses_to_become_response_level() -> None:
    from mmalign.errors import NeedsError

    with pytest.raises(NeedsError, match="weight"):
        presets.rrpo()(Tokens(GOLDEN["rrpo"][0]["inputs"]).batch())


@named("rrpo", quirk=True)
def test_rrpo_quirk_is_not_reproduced(case: dict[str, Any]) -> None:
    loss = rrpo(case)(Tokens(case["inputs"]).batch(weight=spans(case)))
    assert abs(loss.value.item() - case["expected"]["loss"]) > 1e-4


@named("adpo")
def test_adpo(case: dict[str, Any]) -> None:
    tokens = Tokens(case["inputs"])
    if case["average_log_prob"]:
        objective = presets.sigmoid_norm(case["beta"])
    elif case["reference_free"]:
        objective = presets.dpo_gamma(case["beta"], gamma=0.0)
    else:
        objective = presets.adpo(case["beta"])
    batch = tokens.batch()
    loss = objective(batch)
    assert loss.rewards is not None
    assert loss.rows is not None
    reduce = "mean" if case["average_log_prob"] else "sum"
    policy = unfold(over_positions(batch.policy, batch.mask, reduce=reduce))
    reference = unfold(over_positions(tokens.batch().reference, batch.mask, reduce=reduce))
    got = {
        "policy_logps": policy,
        "ref_logps": reference,
        "losses": loss.rows,
        "loss": loss.value,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "grad_logits": gradient(loss, tokens.logits)[0],
    }
    if case["reference_free"]:  # the release logs the log-ratio all the same
        rewards = case["beta"] * fold(policy - reference)
        got |= {"chosen_rewards": rewards[:, 0], "rejected_rewards": rewards[:, 1]}
    compare(case["expected"], got, tol=TOL)


@named("adpo", quirk=True)
def test_adpo_quirk_is_not_reproduced(case: dict[str, Any]) -> None:
    """Labels expanded with the inserted media positions, padding unscored, mean over rows."""
    source, expected = case["inputs"], case["expected"]
    width = len(source["policy_logits"][0][0])
    at, extra = source["insert_at"], source["inserted_tokens"]

    def expanded(row: list[int]) -> list[int]:
        row = [*row[:at], *([-100] * extra), *row[at:]]
        return row + [-100] * (width - len(row))

    def rows(key: str) -> list[Any]:
        """The file's [row][first, second] logits as first rows, then second rows."""
        return [row[side] for side in (0, 1) for row in source[key]]

    flat = {
        "policy_logits": rows("policy_logits"),
        "ref_logits": rows("ref_logits"),
        "labels": [
            *map(expanded, source["labels_first"]),
            *map(expanded, source["labels_second"]),
        ],
    }
    batch = Tokens(flat).batch()
    first = presets.adpo(case["beta"])(batch)
    second = presets.adpo(case["beta"])(batch.columns((1, 0)).replace(labels=batch.labels))
    assert first.rows is not None
    assert second.rows is not None
    got = {
        "correct_per_sample_first_is_chosen": first.rows,
        "correct_loss_first_is_chosen": first.value,
        "correct_per_sample_second_is_chosen": second.rows,
        "correct_loss_second_is_chosen": second.value,
    }
    skip = dict.fromkeys(("official_loss", "official_per_sample"), "the released defects")
    compare(expected, got, tol=TOL, skip=skip)
    assert abs(first.value.item() - expected["official_loss"]) > 1e-3


def reconstructed_selection(
    case: dict[str, Any], base: Tensor, clips: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """How the file weighs the clips, straight from its inputs: close gate, divergence, bag."""
    log_p = log_softmax(base)[:, None, :-1]  # [B, 1, L, V]
    log_q = log_softmax(clips)[:, :, :-1]  # [B, K, L, V]
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    both = sum((x.exp() * (x - middle)).sum(-1) for x in (log_p, log_q)) / 2  # [B, K, L]
    jsd = (both * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)

    similarity = tensor(case["inputs"]["similarity"])
    close = similarity >= case["tau_close"]
    nearest = similarity == similarity.amax(1, keepdim=True)
    close = torch.where(close.any(1, keepdim=True), close, nearest)
    far = jsd.masked_fill(~close, -torch.inf)
    selected = far.argmax(1)
    weights = {
        "hard": torch.eye(far.shape[1], dtype=far.dtype)[selected],
        "soft": (far / case["temperature"]).softmax(1),
        "mean": close.double() / close.sum(1, keepdim=True),
    }[case["mil"]]
    floor = case["noise_floor"]
    share = (far.amax(1) / floor).clamp(max=1.0) if floor else torch.ones(len(far)).double()
    return {
        "jsd": jsd,
        "close_mask": close.double(),
        "selected": selected.double(),
        "weights": weights,
        "sample_weight": share,
    }


@named("pami_vdpo")
def test_pami(case: dict[str, Any]) -> None:
    """The bag's weights are labels, the noise weight is the row's; every number of the file."""
    source = case["inputs"]
    labels = torch.tensor(source["labels"])[:, 1:]
    mask, target = labels != -100, labels.clamp(min=0)
    base = tensor(source["policy_logits"]).requires_grad_()
    clips = tensor(source["policy_logits_candidates"]).requires_grad_()
    num_clips = clips.shape[1]

    def candidates(whole: Tensor, cut: Tensor) -> Tensor:  # [B, S, V], [B, K, S, V] -> [B, K+1, L]
        logps = log_softmax(torch.cat([whole.unsqueeze(1), cut], 1))[..., :-1, :]
        index = target[:, None, :, None].expand(-1, num_clips + 1, -1, -1)
        return logps.gather(-1, index).squeeze(-1)

    found = reconstructed_selection(case, base.detach(), clips.detach(), mask)
    reference = (tensor(source["ref_logits"]), tensor(source["ref_logits_candidates"]))
    batch = CandidateLogps(
        policy=candidates(base, clips),
        reference=candidates(*reference),
        mask=mask[:, None].expand(-1, num_clips + 1, -1),
        labels=torch.cat([torch.ones(len(mask), 1), found["weights"]], 1),
        row_weight=found["sample_weight"],
    )
    objective = presets.pami_vdpo(case["beta"])
    loss = objective(batch)
    assert loss.rows is not None
    alone = [batch.columns((0, k + 1)) for k in range(num_clips)]
    ones = torch.ones(len(mask), 2).double()
    grads = gradient(loss, base, clips)
    got = found | {
        "candidate_losses": torch.stack(
            [objective.terms["preference"](one.replace(labels=ones)) for one in alone], 1
        ),
        "losses": loss.rows * found["sample_weight"],
        "loss": loss.value,
        "grad_logits": grads[0],
        "grad_logits_candidates": grads[1],
    }
    compare(case["expected"], got, tol=TOL)
    vdpo = [presets.vdpo(case["beta"])(one).rows for one in alone]
    torch.testing.assert_close(got["candidate_losses"].detach(), torch.stack(vdpo, 1))  # type: ignore[arg-type]


def cells(case: dict[str, Any], *order: str) -> CandidateLogps:
    """Candidates from cells: `w_l` is the winning response under the losing visual input."""
    source = case["inputs"]
    policy = torch.stack([tensor(source[f"p{name}"]) for name in order], 1).unsqueeze(-1)
    reference = torch.stack([tensor(source[f"r{name}"]) for name in order], 1).unsqueeze(-1)
    labels = torch.zeros(policy.shape[:2], dtype=torch.float64)
    labels[:, 0] = 1.0
    return CandidateLogps(
        policy=policy,
        reference=reference,
        mask=torch.ones(policy.shape, dtype=torch.bool),
        labels=labels,
    )


@named("family")
def test_closed_forms_of_the_family(case: dict[str, Any]) -> None:
    beta, beta2, alpha, delta = (case[name] for name in ("beta", "beta2", "alpha", "delta"))
    pair, visual = cells(case, "w_w", "l_w"), cells(case, "w_w", "w_l")
    tokens = tensor(case["inputs"]["num_tokens_w"])
    mdpo = presets.mdpo(beta, delta)
    triple = cells(case, "w_w", "l_w", "w_l")
    temporal = presets.tpo_temporal(beta, alpha, "sum")
    got = {
        "dpo": presets.dpo(beta)(pair).rows,
        "mdpo_conditional": mdpo.terms["preference_2"](triple),
        "mdpo_anchor": mdpo.terms["preference_3"](triple),
        "mdpo": mdpo(triple).rows,
        "vdpo": presets.vdpo(beta)(visual).rows,
        "tpo_dpo_plus_nll": temporal.terms["preference"](pair)
        + alpha * temporal.terms["nll"](pair) / tokens,
        "ha_dpo_aux": presets.ha_dpo(beta, alpha)(pair).rows,
        "povid": presets.povid(beta, beta2)(cells(case, "w_w", "l_w", "l_l")).rows,
        "visual_symmetric": presets.vdpo_symmetric(beta)(
            cells(case, "w_w", "l_w", "w_l", "l_l")
        ).rows,
    }
    compare(case["expected"], got, tol=1e-12)  # type: ignore[arg-type]


@named("family")
def test_temporal_nll_is_a_mean_over_tokens(case: dict[str, Any]) -> None:
    """The same numbers spread over positions: the preset's own mean gives the file's value."""
    tokens = torch.tensor(case["inputs"]["num_tokens_w"])
    pair = cells(case, "w_w", "l_w")
    mask = torch.arange(int(tokens.max())) < tokens[:, None]
    mask = torch.stack([mask, mask], 1)  # [B, 2, L]
    spread = pair.replace(
        policy=pair.policy / tokens[:, None, None] * mask,
        reference=None if pair.reference is None else pair.reference / tokens[:, None, None] * mask,
        mask=mask,
    )
    rows = presets.tpo_temporal(case["beta"], case["alpha"])(spread).rows
    assert rows is not None
    compare(case["expected"], {"tpo_dpo_plus_nll": rows}, tol=1e-12,
            skip={k: "above" for k in case["expected"] if k != "tpo_dpo_plus_nll"})  # fmt: skip
