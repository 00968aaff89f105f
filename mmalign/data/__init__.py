"""Records in, Examples out: sources, public layouts, validation, selection and the cache."""

from mmalign.data.convert import to_record
from mmalign.data.example import Candidate, Example, Message
from mmalign.data.parse import parse_record
from mmalign.data.sources import load_examples

__all__ = ["Candidate", "Example", "Message", "load_examples", "parse_record", "to_record"]
