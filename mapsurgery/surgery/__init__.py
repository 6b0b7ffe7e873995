"""Operating on models: walking, matching, planning, changing classes, undoing."""
