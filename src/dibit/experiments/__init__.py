"""What `dibit bench` and `dibit reproduce` share: shapes, models, graphs, trainings that are looked at."""
