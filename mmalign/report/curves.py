"""Which metrics of a run are drawn, and how."""

from __future__ import annotations

from mmalign.report.figures import CHOSEN, REJECTED, Curve, Plot

_LOSS = Plot(
    "Loss",
    "loss",
    (Curve("loss", "training", 0), Curve("loss", "held out", 1, held_out=True)),
)
_MARGIN = Plot(
    "Margin",
    "chosen minus rejected",
    (
        Curve("rewards/margins", "training", 0),
        Curve("rewards/margins", "held out", 1, held_out=True),
    ),
    level=0.0,
)
_STEPS = (
    Plot("Learning rate", "learning rate", (Curve("learning_rate", "training", 0),)),
    Plot("Gradient norm", "before clipping", (Curve("grad_norm", "training", 0),)),
)

PLOTS = (
    _LOSS,
    Plot(
        "Log-ratio of each side, held out",
        "nats",
        (
            Curve("drift/chosen", "chosen", CHOSEN, held_out=True),
            Curve("drift/rejected", "rejected", REJECTED, "--", held_out=True),
            Curve("drift/desirable", "desirable", CHOSEN, held_out=True),
            Curve("drift/undesirable", "undesirable", REJECTED, "--", held_out=True),
        ),
        note="How much more (above 0) or less likely each answer became than under the reference. "
        "The margin can grow while both sides fall.",
        level=0.0,
    ),
    Plot(
        "Implicit reward of each side, training",
        "implicit reward",
        (
            Curve("rewards/chosen", "chosen", CHOSEN),
            Curve("rewards/rejected", "rejected", REJECTED, "--"),
        ),
        note="What the objective compares: for DPO beta times the log-ratio.",
    ),
    _MARGIN,
    Plot(
        "Reward accuracy",
        "share of pairs",
        (
            Curve("rewards/accuracies", "training", 0),
            Curve("rewards/accuracies", "held out", 1, held_out=True),
        ),
        note="It reaches 1 early, in good runs and in ruined ones.",
        bounds=(-0.03, 1.03),
        level=0.5,
    ),
    Plot(
        "Ranking accuracy, held out",
        "share of pairs",
        (
            Curve("ranking_accuracy", "summed", 0, held_out=True),
            Curve("ranking_accuracy_per_token", "per token", 1, "--", held_out=True),
        ),
        note="Share of pairs whose chosen answer the model itself finds at least as likely.",
        bounds=(-0.03, 1.03),
        level=0.5,
    ),
    Plot(
        "KL to the reference, held out",
        "nats per token",
        (Curve("kl_per_token", "held out", 0, held_out=True),),
    ),
    Plot(
        "KL to the reference, training",
        "nats per response",
        (Curve("kl", "training", 0),),
    ),
    Plot(
        "Divergence under altered clips, training",
        "nats",
        (Curve("pami/far", "chosen", 0), Curve("pami/far_max", "farthest", 1, "--")),
        note="How differently the model answers when it sees the altered clip. Near 0 the clips "
        "teach nothing.",
    ),
    *_STEPS,
)

PICTURE_PLOTS = (
    _LOSS,
    Plot(
        "Error on preferred pictures, against the reference",
        "policy minus reference",
        (
            Curve("errors/chosen_diff", "training", CHOSEN),
            Curve("errors/chosen_diff", "held out", 2, held_out=True),
        ),
        note="Below 0 the model explains the preferred pictures better than the reference does; in "
        "the red band it explains them worse, and picture quality falls soon after.",
        level=0.0,
        warns_above=True,
    ),
    Plot(
        "Error on rejected pictures, against the reference",
        "policy minus reference",
        (
            Curve("errors/rejected_diff", "training", REJECTED),
            Curve("errors/rejected_diff", "held out", 2, held_out=True),
        ),
        note="Above 0: the model has moved away from them.",
        level=0.0,
    ),
    Plot(
        "Denoising error of preferred pictures",
        "squared error",
        (
            Curve("errors/policy_chosen", "policy", 0),
            Curve("errors/ref_chosen", "reference", 1, "--"),
        ),
        note="It depends on the noise level drawn far more than on the model.",
    ),
    Plot(
        "Denoising error of rejected pictures",
        "squared error",
        (
            Curve("errors/policy_rejected", "policy", 0),
            Curve("errors/ref_rejected", "reference", 1, "--"),
        ),
    ),
    _MARGIN,
    Plot(
        "Implicit accuracy",
        "share of pairs",
        (
            Curve("rewards/accuracies", "training", 0),
            Curve("reward_accuracy", "held out", 1, held_out=True),
        ),
        note="It reaches 1 early, in good runs and in ruined ones.",
        bounds=(-0.03, 1.03),
        level=0.5,
    ),
    Plot("KL to the reference, training", "error gap", (Curve("kl", "training", 0),)),
    *_STEPS,
)
