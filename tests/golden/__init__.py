"""What users may rely on, as text: the package's public face, and the sentences that it says about mistakes.

    python -m tests.golden --write      writes both files anew, after a change that is meant

Both are made from the code itself: names by importing, options by asking the commands, configs by composing them, files
by running four tiny jobs, sentences by reading the source.
"""
