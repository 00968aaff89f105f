"""MVBench: twenty tasks on clips of eleven data sets."""

from __future__ import annotations

from mmalign.benchmark.choice import BothCodes, TaskFiles

FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""Where the clips of a task lie; those of episodic_reasoning are folders of frames, 3 a second."""


class MVBench(BothCodes, TaskFiles):
    """Accuracy per task; the average is over all questions."""

    name = "mvbench"
    title = "MVBench, 20 tasks"
    metric = "accuracy over all questions; macro and each task besides"
    source = "Li et al. 2023, arXiv:2311.17005; pritamqu/RRPO, eval/mvbench"

    def clip(self, video: str, task: str) -> str:
        """Below the folder of the task's data set."""
        return f"{FOLDERS[task]}/{video}" if task in FOLDERS else video
