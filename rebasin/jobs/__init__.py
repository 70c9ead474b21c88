"""The jobs behind `python -m rebasin.run` and its like: configuration in, a folder of results out."""
