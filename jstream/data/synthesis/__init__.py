"""Streaming instruction data from offline annotations, made by an LLM or a VLM behind an OpenAI-compatible endpoint.

    job.py            the records of a file, one after another, through threads or Beam, resumable to the record
      live_chats.py   chats of VideoLLM-online's scheme
      streamo_tasks.py    the five tasks of Streamo
        prompts.py    all that a model is asked
        asking.py     a prompt, its strictly read answer, one second try
          llm.py      the endpoint: retries, pace, a cache in which nothing is paid twice

Nothing here reads the annotation files of other datasets: `data.annotations` does.
"""
