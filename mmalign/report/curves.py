"""Which metrics of a run are drawn, and how."""

from __future__ import annotations

from mmalign.report.figures import CHOSEN, REJECTED, Curve, Plot

PLOTS = (
    Plot(
        "Loss",
        "loss",
        (Curve("loss", "training", 0), Curve("loss", "held out", 1, held_out=True)),
    ),
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
    Plot(
        "Margin",
        "chosen minus rejected",
        (
            Curve("rewards/margins", "training", 0),
            Curve("rewards/margins", "held out", 1, held_out=True),
        ),
        level=0.0,
    ),
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
    Plot("Learning rate", "learning rate", (Curve("learning_rate", "training", 0),)),
    Plot("Gradient norm", "before clipping", (Curve("grad_norm", "training", 0),)),
)
