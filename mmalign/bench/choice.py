"""Benchmarks of questions with lettered options, one of which is right.

MVBench, TVBench, MLVU, LongVideoBench, Video-MME, AVQA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from mmalign.bench.base import Benchmark, Entry, Prediction, Question, Source, Verdict
from mmalign.bench.base import entry as as_entry
from mmalign.bench.parsers import LETTERS, letter
from mmalign.bench.spoken import glossary
from mmalign.errors import DataError

_ANY_LETTER = re.compile(r"[A-Za-z]")


def first_letter(text: str) -> str | None:
    """The first alphabetic character of an answer, as RRPO's copies of the scorers read it.

    "The answer is (B)" is read as T.

    Source: pritamqu/RRPO, eval/tvbench, eval/mvbench, eval/mlvu, eval/longvideobench.
    """
    found = _ANY_LETTER.search(text)
    return found[0].upper() if found else None


def first_word_fits(text: str, letter: str) -> bool:
    """Whether TVBench's and MVBench's own code takes an answer for a letter.

    Its first word, up to a blank, must be part of `(b)` but for full stops, or hold it: "b)" and
    "(B)dog" are right, and so is an answer that is empty or begins with a blank.

    Source: daniel-cores/tvbench, vqa_dataset.py; OpenGVLab/Ask-Anything, mvbench.ipynb; check_ans.
    """
    word, option = text.lower().split(" ")[0], f"({letter.lower()})"
    return word.replace(".", "") in option or option in word


def listed(question: str, options: Sequence[str], mark: str = "({}) {}") -> str:
    """A question with its lettered options, as MVBench asks it."""
    lines = [mark.format(LETTERS[i], option) for i, option in enumerate(options)]
    return "\n".join([f"Question: {question}", "Options:", *lines])


def right_letter(answer: str, options: Sequence[str], where: str) -> str:
    """The letter of the option that is the answer, which is given by its text or its letter.

    Raises:
        DataError: It is neither.
    """
    if answer in options:
        return LETTERS[list(options).index(answer)]
    given = answer.strip().strip("().").upper()
    if len(given) == 1 and given in LETTERS[: len(options) or 26]:
        return given
    raise DataError(f"{where}: the answer {answer!r} is none of the {len(options)} options")


class Choice(Benchmark):
    """Accuracy of letters."""

    strict = "the letter given as the answer, or the one option whose text is said"
    legacy = "the first alphabetic character; questions without an answer are left out"
    skips_missing = True

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether the letter that is read is the right one."""
        if legacy and self.code == "original":
            letters = (row.answer, *LETTERS[: len(row.options)])
            read = next((letter for letter in letters if first_word_fits(text, letter)), None)
        else:
            read = first_letter(text) if legacy else letter(text, row.options)
        return Verdict(read, read == row.answer)


class BothCodes(Choice):
    """Choices that can be read as RRPO's copies do, or as the benchmark's own code does."""

    codes = ("rrpo", "original")
    legacy = (
        "rrpo: the first alphabetic character; original: the first word is part of `(a)` or holds "
        "it; questions without an answer are left out"
    )


class TaskFiles(Choice):
    """One file a task: a list of `{video, question, candidates, answer}`; so MVBench has them."""

    layout = "task.json: [{video, question, candidates, answer, start?, end?, prediction?}, ...]"
    metric = "accuracy over all questions; macro and each task besides"
    suffix = "\nOnly give the best option."
    task_key: ClassVar[str] = ""  # under which a question names its task; "": the file's name does

    def items(self, source: Source) -> Iterator[Question]:
        """Questions are numbered from 0 in their file."""
        counts: dict[str, int] = {}
        for entry in source.entries():
            options = entry.texts("candidates")
            task = (self.task_key and entry.maybe(self.task_key)) or source.path.stem
            number = counts[task] = counts.get(task, -1) + 1
            yield Question(
                id=f"{task}/{number}",
                task=task,
                prompt=listed(entry.text("question"), options) + self.suffix,
                video=self.clip(entry.text("video"), task),
                start=entry.seconds("start"),
                end=entry.seconds("end"),
                options=tuple(options),
                answer=right_letter(entry.text("answer"), options, entry.where),
                said=entry.said(),
            )

    def clip(self, video: str, task: str) -> str:
        """The clip's file in the folder of all media."""
        return video


class OneFile(Choice):
    """A list of questions in one file, which name the right option by its place."""

    keys: ClassVar[tuple[str, str, str, str]]  # of question, options, right option's place, video
    by: ClassVar[Mapping[str, str]]  # table of `tables` to the key in the file
    task_table: ClassVar[str]  # of these the one that is the task
    mark: ClassVar[str] = "({}) {}"  # how an option is written
    video_ending: ClassVar[str] = ""  # what the file's name lacks

    def items(self, source: Source) -> Iterator[Question]:
        """One an entry."""
        yield from map(self.asked, source.entries())

    def asked(self, entry: Entry) -> Question:
        """The question of an entry; tables that it does not name are left out."""
        question, choices, right, video = self.keys
        options = entry.texts(choices)
        named = {table: entry.maybe(key) for table, key in self.by.items()}
        return Question(
            id=entry.text("id"),
            task=named[self.task_table] or "",
            prompt=listed(entry.text(question), options, self.mark) + self.ending,
            video=entry.text(video) + self.video_ending,
            options=tuple(options),
            answer=LETTERS[entry.place(right, len(options))],
            meta={table: name for table, name in named.items() if name},
            said=entry.said(),
        )


FOLDERS = glossary("""
star/Charades_v1_480: action_sequence action_prediction object_interaction
ssv2_video: action_antonym
Moments_in_Time_Raw/videos: fine_grained_action
FunQA_test/test: unexpected_action
clevrer/video_validation: object_existence moving_direction moving_count moving_attribute
clevrer/video_validation: counterfactual_inference
perception/videos: object_shuffle action_count state_change character_order
sta/sta_video: action_localization
scene_qa/video: scene_transition
nturgbd: fine_grained_pose
vlnqa: egocentric_navigation
tvqa/frames_fps3_hq: episodic_reasoning
""")
"""Where the clips of a task lie; those of episodic_reasoning are folders of frames, 3 a second."""


class MVBench(BothCodes, TaskFiles):
    """Accuracy per task; the average is over all questions."""

    name = "mvbench"
    title = "MVBench, 20 tasks"
    source = "Li et al. 2023, arXiv:2311.17005; pritamqu/RRPO, eval/mvbench"

    def clip(self, video: str, task: str) -> str:
        """Below the folder of the task's data set."""
        return f"{FOLDERS[task]}/{video}" if task in FOLDERS else video


class TVBench(BothCodes, TaskFiles):
    """Accuracy per task; the average is over all questions."""

    name = "tvbench"
    title = "TVBench, 10 tasks"
    source = "Cores et al. 2024, arXiv:2410.07752; pritamqu/RRPO, eval/tvbench"

    def clip(self, video: str, task: str) -> str:
        """Each task has a folder of its name."""
        return f"{task}/{video}"


class MLVU(TaskFiles):
    """Mean over tasks of their accuracy (M-Avg)."""

    name = "mlvu"
    title = "MLVU, multiple choice"
    layout = "task.json: [{video, question, question_type, candidates, answer, prediction?}, ...]"
    metric = "unweighted mean of the tasks' accuracy; over all questions besides"
    headline = "macro"
    source = "Zhou et al. 2024, arXiv:2406.04264; pritamqu/RRPO, eval/mlvu"
    task_key = "question_type"  # files are called 1_plotQA.json and so on


class LongVideoBench(OneFile):
    """Accuracy, in all and by duration and category."""

    name = "longvideobench"
    title = "LongVideoBench, validation"
    layout = "[{id, video_path, question, candidates, correct_choice: int, prediction?}, ...]"
    metric = "accuracy over all questions; by duration group and category besides"
    suffix = "\nAnswer with the option's letter from the given choices directly."
    source = "Wu et al. 2024, arXiv:2407.15754; pritamqu/RRPO, eval/longvideobench"
    tables = ("duration", "category")
    keys = ("question", "candidates", "correct_choice", "video_path")
    by = MappingProxyType({"duration": "duration_group", "category": "question_category"})
    task_table = "category"
    mark = "{}. {}"

    def items(self, source: Source) -> Iterator[Question]:
        """Question files, and `{id, pred, gt}` as RRPO writes answers."""
        for entry in source.entries():
            name = entry.text("id")
            drawn = {"video": entry.maybe("video_id") or name.rpartition("_")[0] or name}
            if "candidates" not in entry.value:
                answer = right_letter(entry.text("gt"), (), entry.where)
                yield Question(name, "", "", "", answer, meta=drawn, said=entry.said("pred"))
                continue
            question = self.asked(entry)
            yield replace(question, meta={**drawn, **question.meta})


_LETTERED = re.compile(r"^\s*\(?[A-Z][.):]\s*")

MERGED_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is" + "The correct option is",  # a comma is missing in the published list
    "Best answer:" + "Best option:",  # and here
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)
"""What the published scorer takes away before it looks for a letter."""


def published_letter(text: str) -> str | None:
    """The first of A to D that is left; "Best answer: C" is read as B, the first capital of Best.

    Source: pritamqu/RRPO, eval/videomme/calculate.py, after Video-MME's own script.
    """
    for prefix in MERGED_PREFIXES:
        text = text.replace(prefix, "")
    found = re.search("[A-D]", text)
    return found[0] if found else None


class AVQA(OneFile):
    """Questions about what is seen and heard; accuracy in all and by type of question."""

    name = "avqa"
    title = "AVQA"
    layout = "[{id, video_name, question_text, multi_choice: [4], answer: int, prediction?}, ...]"
    metric = "accuracy over all questions; by question type and relation besides"
    suffix = "\nAnswer with the option's letter from the given choices directly. (ours)"
    legacy = "the same: the published code classifies and reads no text"
    skips_missing = False
    source = "Yang et al. 2022, AVQA (ACM Multimedia)"
    tables = ("type", "relation")
    keys = ("question_text", "multi_choice", "answer", "video_name")
    by = MappingProxyType({"type": "question_type", "relation": "question_relation"})
    task_table = "type"
    video_ending = ".mp4"

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """One way to read, legacy or not."""
        return super().judge(text, row, legacy=False)


class VideoMME(Choice):
    """Accuracy in all, by duration, domain, sub-category and task type."""

    name = "videomme"
    title = "Video-MME, without subtitles"
    layout = (
        "[{video_id, duration, domain, sub_category, questions: [{question_id, task_type, "
        "question, options, answer, response?}]}, ...], or a row a question"
    )
    metric = "accuracy over all questions; by duration, domain, sub-category and task type besides"
    suffix = "a sentence between question and options: respond with only the letter"
    legacy = (
        "strips a list of prefixes, two of which lack a comma, and takes the first capital A to D; "
        "answers without one are left out"
    )
    source = "Fu et al. 2024, arXiv:2405.21075; pritamqu/RRPO, eval/videomme"
    tables = ("duration", "domain", "sub_category", "task_type")

    def items(self, source: Source) -> Iterator[Question]:
        """Nested by video, or flat as in the published table."""
        for video in source.entries():
            inner = video.value.get("questions")
            if not isinstance(inner, list):
                yield self._item(video, video)
                continue
            for i, item in enumerate(inner, start=1):
                yield self._item(video, as_entry(item, f"{video.where} question {i}"))

    def _item(self, video: Entry, asked: Entry) -> Question:
        options = _options(asked)
        meta: dict[str, Any] = {key: video.text(key) for key in self.tables[:3]}
        meta["task_type"] = asked.text("task_type")
        meta["video"] = video.text("video_id")
        prompt = (
            f"{asked.text('question')}\nSelect the best answer to the following multiple-choice "
            "question based on the video. Respond with only the letter (A, B, C, or D) of the "
            "correct option.\n" + "\n".join(options) + "\n"
        )
        texts = tuple(_LETTERED.sub("", option) for option in options)
        return Question(
            id=asked.text("question_id"),
            task=meta["task_type"],
            prompt=prompt,
            video=f"{video.maybe('videoID') or meta['video']}.mp4",
            options=texts,
            answer=right_letter(asked.text("answer"), texts, asked.where),
            meta=meta,
            said=asked.said("response"),
        )

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Whether the letter that is read is the right one."""
        if legacy:
            read = published_letter(text)
            return Verdict(read, read == row.answer, counted=read is not None)
        read = letter(text, row.options, 4)
        return Verdict(read, read == row.answer)


def _options(asked: Entry) -> list[str]:
    """Options as they are written, with their letters; RRPO's files join them with line breaks."""
    value = asked.value.get("options")
    if isinstance(value, str):
        return value.split("\n")
    return asked.texts("options")
