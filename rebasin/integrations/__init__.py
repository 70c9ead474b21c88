"""Other people's packages, made to work beside ours."""
