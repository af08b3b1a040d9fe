"""Files of rows: their formats, and how they are read, scored and written."""
