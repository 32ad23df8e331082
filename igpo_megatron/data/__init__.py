"""Questions and corpora, as files and as streams.

prompts.py         the stream of questions that a run trains on. Begin here.
question_files.py  parquet files of questions, in any of the layouts known
corpus.py          passages to search in

Imports types only.
"""
