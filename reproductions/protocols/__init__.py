"""What several columns share: data sets, teacher/student pairs, training recipes."""
