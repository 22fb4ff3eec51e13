"""Building TensorRT engines: shapes, profiles, the builder, the audit of what it built."""
