"""llama.cpp through llama-cpp-python's low-level interface, several sequences at once."""
# pyright: reportMissingImports=false

import ctypes
import time

NUM_SEQS = 8
TOKENS_PER_SEQ = 2048
BATCH = 512  # tokens per llama_decode call, as llama.cpp's own tools default to for n_ubatch


class Target:
    """One stream of KV per sequence; a prefix of what sequence 0 holds is kept and copied.

    llama.cpp's defaults stay: f16 KV, automatic flash attention.
    """

    packages = ("llama-cpp-python", "numpy")

    def __init__(
        self,
        model: str,
        dtype: str,
        threads: int,
        streams: bool = False,
        max_model_len: int = 4096,
        **sizes: int,
    ) -> None:
        import llama_cpp

        del dtype, sizes  # the file's tensor types decide; streams run one by one
        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._silent = log(lambda level, text, data: None)  # referenced as long as the library logs
        lib.llama_log_set(self._silent, None)
        self.model = lib.llama_model_load_from_file(
            model.encode(), lib.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model file")
        params = lib.llama_context_default_params()
        self.num_seqs = 1 if streams else NUM_SEQS
        params.n_ctx = max_model_len if streams else NUM_SEQS * TOKENS_PER_SEQ
        params.n_seq_max = self.num_seqs
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = lib.llama_get_memory(self.context)
        self.num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.held: list[int] = []  # the tokens whose KV sequence 0 holds

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Greedy; prefills in batches of 512 tokens, then decodes all sequences in step."""
        start = time.perf_counter()
        skip = self._reuse(prompts)
        tokens: list[list[int]] = []
        first: list[float] = []
        for seq, prompt in enumerate(prompts):
            tokens.append([self._prefill(seq, prompt, skip)])
            first.append(time.perf_counter() - start)
        for step in range(max_tokens - 1):
            rows = [(ids[-1], len(p) + step) for p, ids in zip(prompts, tokens, strict=True)]
            for ids, token in zip(tokens, self._step(rows), strict=True):
                ids.append(token)
        self.held = prompts[0] + tokens[0][:-1]
        return {
            "token_ids": tokens,
            "first_token_s": first,
            "cached_tokens": [skip] * len(prompts),
        }

    def stream(self, prompt: list[int], max_tokens: int):
        """Greedy, one request at a time: a list of one new id after each step."""
        skip = self._reuse([prompt])
        tokens = [self._prefill(0, prompt, skip)]
        yield tokens[-1:]
        for step in range(max_tokens - 1):
            tokens += self._step([(tokens[-1], len(prompt) + step)])
            yield tokens[-1:]
        self.held = prompt + tokens[:-1]

    def reset(self) -> None:
        """Forgets all KV."""
        self.lib.llama_memory_clear(self.memory, False)
        self.held = []

    def _reuse(self, prompts: list[list[int]]) -> int:
        """Leaves in every sequence the KV of the longest common prefix with sequence 0."""
        skip = 0
        shortest = min(map(len, prompts)) - 1  # the last prompt token is always run
        while skip < min(shortest, len(self.held)) and all(
            prompt[skip] == self.held[skip] for prompt in prompts
        ):
            skip += 1
        if skip == 0:
            self.reset()
            return 0
        lib = self.lib
        lib.llama_memory_seq_rm(self.memory, 0, skip, -1)
        for seq in range(1, self.num_seqs):
            lib.llama_memory_seq_rm(self.memory, seq, -1, -1)
        for seq in range(1, len(prompts)):
            lib.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)
        return skip

    def _prefill(self, seq: int, prompt: list[int], skip: int) -> int:
        for begin in range(skip, len(prompt), BATCH):
            end = min(begin + BATCH, len(prompt))
            rows = [(prompt[at], at, seq, at == len(prompt) - 1) for at in range(begin, end)]
            self._decode(rows)
        return self._argmax(-1)

    def _step(self, rows: list[tuple[int, int]]) -> list[int]:
        """One token of every sequence; (token, position) per sequence."""
        self._decode([(token, at, seq, True) for seq, (token, at) in enumerate(rows)])
        return [self._argmax(row) for row in range(len(rows))]

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            batch.logits[i] = wants_logits
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _argmax(self, row: int) -> int:
        import numpy as np

        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.num_vocab,)).argmax())
