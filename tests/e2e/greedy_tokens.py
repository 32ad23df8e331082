"""What vLLM continues a prompt with at temperature 0, model folder by model folder in one process: starting engines costs more than asking.

python greedy_tokens.py PROMPT_TOKENS NEW_TOKENS FOLDER ...     prints one JSON list of tokens per folder
"""

from __future__ import annotations

import gc
import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def main(prompt: str, new_tokens: str, *folders: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    params = SamplingParams(temperature=0.0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False)
    for folder in folders:
        settings = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**26, "max_model_len": 128}
        engine = LLM(model=folder, skip_tokenizer_init=True, seed=0, **settings)
        (output,) = engine.generate([{"prompt_token_ids": json.loads(prompt)}], params, use_tqdm=False)
        sys.stdout.write(json.dumps(list(output.outputs[0].token_ids)) + "\n")
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
