"""Values that papers and released code trained with, each with its source.

A range is what was published. A setting is in doubt beyond `slack` times its ends: models, data
and batches differ, and a careful choice may well lie a little outside of what others chose.

Where the names were read: alignment-handbook (Zephyr, SmolLM2, Zephyr-ORPO), open-instruct (Tulu 3,
OLMo 3), NeMo-Aligner's guide, TRL's examples and paper index (DPO, ORPO, RSO, EXO, AlphaPO, rDPO),
HALOs (KTO, cDPO), abacusai/smaug issue 2, and the training scripts of SimPO, QLoRA, InternVL,
LLaVA, LLaVA-Hound, Qwen-VL, RLAIF-V, POVID, RRPO, ms-swift, MaPO, Diffusion-KTO and diffusers.
Nemotron-4 is from a summary of its report.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """From the lowest to the highest published value."""

    low: float
    high: float
    source: str
    slack: float = 10.0

    def side(self, value: float) -> str:
        """ "above", "below", or "" where the value is in no doubt."""
        if value > self.high * self.slack * (1 + 1e-9):
            return "above"
        return "below" if value < self.low / self.slack * (1 - 1e-9) else ""

    def __str__(self) -> str:
        ends = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        return f"{ends} ({self.source})"


_PREFERENCES = "Nemotron-4, OLMo 3, Tulu 3, Zephyr, SimPO, ORPO; TRL's 0.001 is of GPT-2"
_VIDEO_SUPERVISED = "Qwen-VL, LLaVA; supervised; 0.001 is of LLaVA's projector alone"
_DIFFUSION_LORA = "Diffusion-DPO in diffusers, Diffusion-NPO, SPO, Flow-DPO"

LEARNING_RATES: dict[tuple[str, bool, bool], Range] = {
    ("text", False, False): Range(3e-8, 1e-5, _PREFERENCES),
    ("text", True, False): Range(5e-7, 1e-3, "Zephyr, LLaMA-Factory, TRL; LoRA", slack=3.0),
    ("text", False, True): Range(1e-7, 1e-3, "FSPO, Tulu 3, SmolLM2; supervised", slack=3.0),
    ("text", True, True): Range(1e-4, 2e-4, "QLoRA, Zephyr; supervised", slack=20.0),
    ("video", False, False): Range(2e-7, 1e-5, "InternVL-MPO, LLaVA-Hound, ms-swift"),
    ("video", True, False): Range(1e-7, 1e-4, "POVID, ADPO, RRPO, ms-swift; LoRA", slack=3.0),
    ("video", False, True): Range(2e-7, 1e-3, _VIDEO_SUPERVISED, slack=3.0),
    ("video", True, True): Range(2e-5, 2e-4, "Qwen-VL, LLaVA; supervised, LoRA", slack=20.0),
    ("diffusion", False, False): Range(8.2e-9, 2.05e-5, "Diffusion-DPO, Diffusion-KTO, SmPO, MaPO"),
    ("diffusion", True, False): Range(5e-6, 5e-4, _DIFFUSION_LORA),
    ("diffusion", False, True): Range(1e-7, 1e-4, "Self-NPO, diffusers' text_to_image"),
    ("diffusion", True, True): Range(
        1e-4, 5e-4, "diffusers' text_to_image_lora, dreambooth_lora", slack=30.0
    ),
}
"""Modality, whether a LoRA is trained, whether single responses are imitated: of AdamW."""

RATES_A_ROW: dict[tuple[str, bool, bool], Range] = {
    ("diffusion", False, False): Range(
        4e-12, 6.25e-7, "Diffusion-DPO's --scale_lr, MaPO on one device", slack=1.5
    ),
}
"""Learning rate over the rows of a step, where releases scale it so."""

_NATS = Range(3e-4, 5.0, "Nemotron-4, Zephyr, DPO, SmolLM2, NeMo-Aligner", slack=2.0)
_ERRORS = Range(500.0, 5000.0, "DCPO, Diffusion-DPO", slack=5.0)

STRENGTHS: dict[str, dict[str, Range]] = {
    "ipo": {"tau": _NATS},
    "cdpo": {"beta": _NATS, "flip": Range(0.0, 0.2, "cDPO in HALOs", slack=2.4)},
    "rso": {"gamma": Range(0.05, 0.05, "RSO", slack=100.0)},
    "sigmoid_norm": {"beta": Range(5.0, 5.0, "Tulu 3")},
    "simpo": {
        "beta": Range(2.0, 10.0, "SimPO", slack=5.0),
        "gamma": Range(0.0, 5.0, "SimPO", slack=2.0),
    },
    "alphapo": {"beta": Range(2.0, 10.0, "SimPO, AlphaPO", slack=5.0)},
    "exo": {"beta": Range(0.1, 1.0, "EXO", slack=5.0)},
    "asft": {"beta": Range(1.0, 1.0, "ASFT in turbo-alignment", slack=100.0)},
    "orpo": {"lam": Range(0.05, 0.1, "Zephyr-ORPO, ORPO", slack=100.0)},
    "dpop": {"beta": _NATS, "penalty": Range(5.0, 500.0, "Smaug")},
    "sppo": {"beta": Range(1e-3, 1e-3, "SPPO", slack=20.0)},
    "gpo": {"beta": Range(1e-3, 2e-3, "GPO", slack=20.0)},
    "inpo_nash": {"eta": Range(7.5e-3, 7.5e-3, "INPO", slack=20.0)},
    "flex_dpo": {"beta_chosen": _NATS, "beta_rejected": _NATS},
    "povid": {"beta": _NATS, "beta_rejected": _NATS},
    "rrpo": {"beta": _NATS, "alpha": Range(0.01, 0.1, "RRPO")},
    "tdpo2": {"beta": _NATS, "alpha": Range(0.5, 0.5, "TDPO", slack=50.0)},
    "smpo": {"beta": Range(20000.0, 50000.0, "SmPO, with its constant 10", slack=5.0)},
    "inpo": {"beta": Range(2000.0, 5000.0, "InPO", slack=5.0)},
    "diffusion_npo": {"beta": Range(1000.0, 2000.0, "Diffusion-NPO", slack=5.0)},
    "flow_dpo": {"beta": Range(100.0, 100.0, "Flow-DPO in flow_grpo", slack=25.0)},
    "diffusion_kto": {"beta": Range(1000.0, 1000.0, "Diffusion-KTO", slack=25.0)},
    "mapo": {"beta": Range(0.1, 0.1, "MaPO")},
    "diffusion_orpo": {"beta": Range(0.1, 0.1, "diffusers")},
}
"""Constants of losses, by preset and keyword."""

OF_NATS: dict[str, Range] = {"beta": _NATS}
"""Constants of every other loss on log-probabilities of tokens."""

OF_ERRORS: dict[str, Range] = {"beta": _ERRORS}
"""Constants of every other loss on errors of a picture, which are per unit of mean error."""

EPOCHS = {
    "text": Range(1.0, 5.0, "Zephyr, SmolLM2, ORPO"),
    "video": Range(1.0, 10.0, "RRPO, LLaVA-Hound, RLAIF-V", slack=5.0),
}
"""Passes over the rows, by modality; small sets of pictures are often seen a hundred times."""
WARM_UP = Range(0.0, 0.5, "InPO and SmPO; most papers have 0 to 0.25", slack=1.0)
"""Share of a run."""

BETA1 = Range(0.0, 0.95, "Adam's 0.9, RMSprop's 0", slack=1.0)
BETA2 = Range(0.9, 0.9999, "0.95 of Qwen-VL to Adam's 0.999", slack=1.0)
WEIGHT_DECAY = Range(0.0, 0.1, "Qwen-VL; 0.01 in Diffusion-DPO", slack=5.0)
LORA_SCALE = Range(0.25, 4.0, "QLoRA, RRPO, ms-swift", slack=4.0)
"""alpha over rank."""

DESIRABLE: dict[str, Range] = {
    "kto": Range(1.0, 4 / 3, "KTO", slack=4.0),
    "apo_zero_unpaired": Range(1.0, 4 / 3, "KTO", slack=4.0),
    "diffusion_kto": Range(1.0, 4.0, "KTO, Diffusion-KTO", slack=4.0),
}
"""Weights of desirable over those of undesirable rows."""
