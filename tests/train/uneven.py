"""A model none of whose widths two or four ranks can share evenly; no text is read."""

UNEVEN = (
    "data=files",
    "data.sources.files.paths=unread.jsonl",
    "data.lanes=1",
    "model.layers=2",
    "model.dim=18",
    "model.ffn_dim=26",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=8",
    "model.vocab_size=61",
    "model.max_seq_len=64",
    "train.global_batch=8",
    "train.seq_len=16",
    "hooks=quiet",
    "hooks.sample.tokens=4",
    "engine.device=cpu",
    "engine.threads=1",
)
COPIES = ("model=phd_cswa", "model.K=3", "model.window=3", "model.chunk=4")
COPIES += ("model.copy_embedding=true",)
