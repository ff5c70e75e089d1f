"""From results/ to tables, figures and the report; reads files only, never a model."""
