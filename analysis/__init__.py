"""From results/ to tables, figures and the report; reads files only, never a model."""

from analysis.compare import write_summary

__all__ = ["write_summary"]
