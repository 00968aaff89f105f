"""Records in, Examples out: sources, public layouts, validation, selection and the cache."""
