"""A world to watch the pipeline in: a real data set, real target APIs, and a check that they agree."""
