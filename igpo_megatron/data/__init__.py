"""Questions and corpora, as files and as streams.

prompts.py         the stream of questions that a run trains on. Begin here.
question_files.py  parquet files of questions, in any of the layouts known
corpus.py          passages to search in
questions.py, corpora.py  make such files of published ones; records.py reads these. commands.py is `igpo data`

Imports types and supervision; commands.py may import any room below.
"""
