"""Soft labels from teachers that are decoupled from students: kept, and on Ray made on demand."""
