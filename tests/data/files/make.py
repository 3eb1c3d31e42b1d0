"""Makes the Parquet files of tests/data/parquet.rs with pyarrow 26.0: python make.py"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent

# As `datasets` writes conversations: a list of structs, whose missing fields are null.
turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.string()))])
chats = pa.table(
    {
        "messages": pa.array(
            [
                [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}],
                [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q2 é"},
                    {"role": "assistant", "content": "A2"},
                    {"role": "user", "content": "Q3"},
                    {"role": "assistant", "content": "A3"},
                ],
                [],
                None,
            ],
            pa.list_(turn),
        ),
        "score": pa.array([0.5, float("nan"), None, float("inf")]),
        "id": pa.array([1, 2, 3, 4], pa.int64()),
    }
)
pq.write_table(chats, HERE / "messages.parquet", compression="snappy", row_group_size=2)

pairs = pa.table(
    {
        "question": [f"Q{i}" for i in range(300)],
        "response": pa.array([None if i == 7 else f"A{i % 5}" for i in range(300)]).dictionary_encode(),
        "when": pa.array([1_700_000_000_000 + i for i in range(300)], pa.timestamp("ms")),
        "raw": pa.array([b"\xff"] * 300, pa.binary()),
        "weight": pa.array([i % 2 for i in range(300)], pa.int8()),
    }
)
pq.write_table(pairs, HERE / "pairs.parquet", compression="zstd", data_page_version="2.0", data_page_size=256)

one = pa.table({"prompt": ["Q"], "completion": ["A"]})
pq.write_table(one, HERE / "gzip.parquet", compression="gzip")

# Texts in delta encodings, as DuckDB, Spark and arrow-rs write them, in both versions of pages.
texts = {
    "prompt": pa.array([f"Question {i // 7} of {i}" for i in range(300)]),
    "completion": pa.array([None if i == 7 else "A" * (i % 40) + str(i) for i in range(300)]),
    "tags": pa.array([[f"tag{j}" for j in range(i % 4)] for i in range(300)], pa.list_(pa.string())),
}
DELTA = {"prompt": "DELTA_BYTE_ARRAY", "completion": "DELTA_LENGTH_BYTE_ARRAY", "tags.list.element": "DELTA_BYTE_ARRAY"}
for version in "1.0", "2.0":
    pq.write_table(pa.table(texts), HERE / f"delta{version[0]}.parquet", compression="none" if version == "1.0" else "zstd",
                   use_dictionary=False, column_encoding=DELTA, data_page_version=version, data_page_size=2048,
                   write_statistics=False)
# 2,000 rows with the same 100 kB, of which all but the first are stored as "as before".
pq.write_table(pa.table({"prompt": ["x" * 100_000] * 2000}), HERE / "bomb_delta.parquet", compression="zstd",
               use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY", write_statistics=False)

# 200 MB of one character, packed into a page of some kB; and a row with ten million turns.
pq.write_table(pa.table({"prompt": ["x" * 200_000_000]}), HERE / "bomb_page.parquet", compression="zstd",
               use_dictionary=False, write_statistics=False)
pq.write_table(pa.table({"tags": pa.array([["x"] * 10_000_000])}), HERE / "bomb_list.parquet", compression="zstd",
               data_page_size=1 << 30)
