"""Do the targets hold what the source holds?"""
