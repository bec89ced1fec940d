"""What scripts/prepare_data.py is made of: corpora of speech from public packages, more speech from synthesisers, checks.

Not part of the package `mel_llm`: who trains on data of their own needs none of it.
"""
