"""Records in, Examples out: sources, public layouts, validation, selection and the cache."""

from mmalign.data.convert import find_layout, to_record
from mmalign.data.example import Candidate, Example, Message, Picture
from mmalign.data.layouts import LAYOUTS
from mmalign.data.parse import OPTIONAL, parse_record
from mmalign.data.records import convert_file, read_records
from mmalign.data.select import (
    all_pairs,
    assign_users,
    best_worst,
    direction,
    first_round,
    leave_one_out,
    precision_reward,
    project,
    recall_hits,
    rejection_rounds,
    rejection_sample,
    tool_reward,
    tournament,
    wider_than,
    win_rate,
    worst_group,
)
from mmalign.data.sources import load_examples
from mmalign.data.validate import Report, check_files

__all__ = [
    "LAYOUTS",
    "OPTIONAL",
    "Candidate",
    "Example",
    "Message",
    "Picture",
    "Report",
    "all_pairs",
    "assign_users",
    "best_worst",
    "check_files",
    "convert_file",
    "direction",
    "find_layout",
    "first_round",
    "leave_one_out",
    "load_examples",
    "parse_record",
    "precision_reward",
    "project",
    "read_records",
    "recall_hits",
    "rejection_rounds",
    "rejection_sample",
    "to_record",
    "tool_reward",
    "tournament",
    "wider_than",
    "win_rate",
    "worst_group",
]
