"""Questions and corpora: files, and the stream that a run draws from.

prompts.py         the stream of questions that a run trains on. Begin here.
question_files.py  parquet files of questions, in any known layout
corpus.py          passages to search in
questions.py, corpora.py  make such files from published ones, read by records.py. commands.py is `igpo data`

Imports types, supervision and what an outcome compares (algorithms/outcomes.py); commands.py may import any room below.
"""
