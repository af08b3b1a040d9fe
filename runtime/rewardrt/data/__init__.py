"""Files of rows: which format they are in, how they are read, scored and written."""
