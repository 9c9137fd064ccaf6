"""Pure functions that score answers; nothing here knows a model or a method."""
