import bz2
import gzip
import json
import lzma
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from celo2.pretrain import prepare_data
from celo2.pretrain.prepare_data import (
    EMBEDDED_TEXT,
    PROGRESS_FILE,
    DatasetRows,
    TextFiles,
    main,
    prepare,
    prepare_embedded,
)
from celo2.pretrain.shards import find_shards, open_shard
from celo2.pretrain.tokenizer import get_tokenizer

BYTES = 256


def documents_of(count: int) -> list[str]:
    rng = np.random.default_rng(count)
    return [f"Title {i}\n\n" + "word " * int(rng.integers(1, 60)) + f"{i}." for i in range(count)]


def text_file(folder: Path, count: int = 60) -> Path:
    path = folder / "books.txt"
    path.write_text("\n\n\n".join(documents_of(count)), encoding="utf-8")
    return path


def stream_of(documents: list[str]) -> np.ndarray:
    tokenizer = get_tokenizer("bytes")
    return np.concatenate([np.append(np.uint16(256), tokenizer.encode(text)) for text in documents])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# sources


def test_documents_are_separated_by_two_blank_lines(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n\n\nOne\r\nline\n\npara\n \n\n\n\nTwo\n\n\n   \n")
    assert list(TextFiles((path, path)).documents(0)) == ["One\nline\n\npara", "Two"] * 2
    assert list(TextFiles((path, path)).documents(3)) == ["Two"]


@pytest.mark.parametrize(("suffix", "opener"), [(".xz", lzma.open), (".gz", gzip.open)])
def test_compressed_text(tmp_path, suffix: str, opener) -> None:
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n\n\n".join(documents_of(30)))
    assert list(TextFiles((path,)).documents(0)) == documents_of(30)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a\.txt{suffix}: the compressed file is damaged or cut short"):
        list(TextFiles((path,)).documents(0))


@pytest.mark.needs("tiktoken")
def test_bad_text_files(tmp_path, capsys) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text .* convert it to UTF-8"):
        list(TextFiles((tmp_path / "latin.txt",)).documents(0))
    (tmp_path / "blank.txt").write_text("\n \n\n\n")
    with pytest.raises(ValueError, match=r"blank\.txt.* has no text"):
        prepare(TextFiles((tmp_path / "blank.txt",)), "bytes", tmp_path / "out")
    assert main(["--text", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "out2")]) == 1
    assert "gone.txt: no such text file; correct the path" in capsys.readouterr().err


# shards


def test_large_text_fills_exact_shards_in_order(tmp_path) -> None:
    source = TextFiles((text_file(tmp_path),))
    done = prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    stream = stream_of(documents_of(60))
    train, val = find_shards(tmp_path / "out")
    assert [path.name for path in val] == ["books_val_000000.bin"]
    assert [path.name for path in train] == [f"books_train_{i:06d}.bin" for i in range(1, len(train) + 1)]
    shards = [open_shard(path, BYTES) for path in val + train]
    assert [len(shard) for shard in shards[:-1]] == [125] + [1000] * (len(shards) - 2)
    np.testing.assert_array_equal(np.concatenate(shards), stream)
    assert done.tokens == len(stream)


def test_small_text_holds_out_every_twentieth_document(tmp_path) -> None:
    prepare(TextFiles((text_file(tmp_path),)), "bytes", tmp_path / "out", shard_tokens=100_000)
    documents = documents_of(60)
    (train,), (val,) = find_shards(tmp_path / "out")
    np.testing.assert_array_equal(open_shard(val, BYTES), stream_of(documents[19::20]))
    kept = [text for i, text in enumerate(documents) if i % 20 != 19]
    np.testing.assert_array_equal(open_shard(train, BYTES), stream_of(kept))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_still_give_both_sets(tmp_path, count: int) -> None:
    prepare(TextFiles((text_file(tmp_path, count),)), "bytes", tmp_path / "out")
    (train,), (val,) = find_shards(tmp_path / "out")
    both = np.concatenate([open_shard(train, BYTES), open_shard(val, BYTES)])
    np.testing.assert_array_equal(both, stream_of(documents_of(count)))


@pytest.mark.parametrize("limit", [500, 2000, 2500, 3000])
def test_max_tokens_cuts_the_stream(tmp_path, limit: int) -> None:
    source = TextFiles((text_file(tmp_path),))
    done = prepare(source, "bytes", tmp_path / "out", shard_tokens=1000, max_tokens=limit)
    assert done.tokens == limit
    if limit >= 2000:
        train, val = find_shards(tmp_path / "out")
        found = np.concatenate([open_shard(path, BYTES) for path in val + train])
        np.testing.assert_array_equal(found, stream_of(documents_of(60))[:limit])


def test_validation_is_a_share_with_a_cap(tmp_path) -> None:
    """Not a half of 2,100 tokens in shards of 1,000, nor a fifth of 470M in shards of 100M."""
    source = TextFiles((text_file(tmp_path),))
    for limit in (1000, 2000, 2100, 4700):
        done = prepare(source, "bytes", tmp_path / str(limit), shard_tokens=1000, max_tokens=limit)
        # every 20th document, of the little that is less than two shards
        assert done.shards[0].tokens <= (limit / 16 if limit >= 2000 else limit / 5)
    assert prepare_data.validation_tokens(prepare_data.SHARD_TOKENS) == 12_500_000


def test_arguments_are_checked(tmp_path) -> None:
    source = TextFiles((text_file(tmp_path),))
    with pytest.raises(ValueError, match="shard_tokens=1; allowed: 2"):
        prepare(source, "bytes", tmp_path / "out", shard_tokens=1)
    with pytest.raises(ValueError, match="max_tokens=0; give at least 2"):
        prepare(source, "bytes", tmp_path / "out", max_tokens=0)


# resume


class Stop(Exception):
    """Stands for anything that ends a run."""


@pytest.mark.parametrize("shard_tokens", [64, 500, 1000])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("call", ["write_shard", "write_atomic"])
def test_interrupted_anywhere_then_resumed_is_bitwise_the_same(
    tmp_path, monkeypatch, shard_tokens: int, stop_after: int, call: str
) -> None:
    source = TextFiles((text_file(tmp_path, 40),))
    prepare(source, "bytes", tmp_path / "whole", shard_tokens=shard_tokens, max_tokens=4321)
    real = getattr(prepare_data, call)
    left = stop_after

    def stopping(*args: object) -> None:
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        real(*args)

    monkeypatch.setattr(prepare_data, call, stopping)
    with pytest.raises(Stop):
        prepare(source, "bytes", tmp_path / "out", shard_tokens=shard_tokens, max_tokens=4321)
    monkeypatch.setattr(prepare_data, call, real)
    assert not prepare(source, "bytes", tmp_path / "out", shard_tokens=shard_tokens, max_tokens=4321).unchanged
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_does_not_write_finished_shards_again(tmp_path, monkeypatch) -> None:
    source = TextFiles((text_file(tmp_path),))
    written: list[str] = []
    real = prepare_data.write_shard

    def recording(path: Path, *args: object) -> None:
        if len(written) == 4:
            written.append("stop")
            raise Stop
        written.append(path.name)
        real(path, *args)

    monkeypatch.setattr(prepare_data, "write_shard", recording)
    with pytest.raises(Stop):
        prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    assert written.count("stop") == 1
    names = [name for name in written if name != "stop"]
    assert len(set(names)) == len(names)


def test_killed_process_resumes_bitwise(tmp_path) -> None:
    path = text_file(tmp_path)
    command = ["--tokenizer", "bytes", "--text", str(path), "--shard-tokens", "1000", "--out"]
    kill = (
        "import os, signal, sys\n"
        "from celo2.pretrain import prepare_data as p\n"
        "real, calls = os.fsync, []\n"
        "def fsync(fd):\n"
        "    calls.append(fd)\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(fd)\n"
        "os.fsync = fsync\n"
        "sys.exit(p.main(sys.argv[1:]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", kill, *command, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert 1 <= len(list((tmp_path / "out").glob("*.bin"))) <= 5
    assert main([*command, str(tmp_path / "out")]) == 0
    assert main([*command, str(tmp_path / "whole")]) == 0
    found = {name: raw for name, raw in contents(tmp_path / "out").items() if not name.endswith(".tmp")}
    assert found == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_damaged_finished_shard_is_made_again(tmp_path, number: int) -> None:
    source = TextFiles((text_file(tmp_path),))
    prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    expected = contents(tmp_path / "out")
    victim = min((tmp_path / "out").glob(f"*_{number:06d}.bin"))
    victim.write_bytes(victim.read_bytes()[:-2])
    assert not prepare(source, "bytes", tmp_path / "out", shard_tokens=1000).unchanged
    assert contents(tmp_path / "out") == expected


def test_complete_run_does_nothing_and_says_so(tmp_path, capsys) -> None:
    command = ["--tokenizer", "bytes", "--text", str(text_file(tmp_path)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert ": prepared: 2 shards, " in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(command) == 0
    assert "already complete, nothing to do" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.needs("tiktoken")
def test_other_arguments_are_refused(tmp_path, capsys) -> None:
    path = text_file(tmp_path)
    command = ["--tokenizer", "bytes", "--text", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = contents(tmp_path / "out")
    for other in (["--shard-tokens", "1000"], ["--max-tokens", "900"], ["--tokenizer", "gpt2"]):
        assert main([*command, *other]) == 1
        assert "was prepared with other arguments or data (" in capsys.readouterr().err
    path.write_text("changed")
    assert main(command) == 1
    assert "other arguments or data (source: " in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_foreign_folder_and_damaged_progress_are_refused(tmp_path) -> None:
    source = TextFiles((text_file(tmp_path),))
    out = tmp_path / "out"
    out.mkdir()
    (out / "other_train_000001.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds other_train_000001\.bin .* give an empty folder as --out"):
        prepare(source, "bytes", out)
    for damaged in (
        "",
        "{}",
        "[]",
        json.dumps({"arguments": {}, "complete": False, "shards": [{"file": "a"}]}),
    ):
        (out / PROGRESS_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"damaged progress file .* delete it and the .bin files"):
            prepare(source, "bytes", out)


# datasets


@pytest.mark.needs("datasets")
def test_dataset_equals_text_and_resumes(tmp_path, monkeypatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(documents_of(60))))
    source = DatasetRows("json", data_files=(str(rows),))
    real = prepare_data.write_shard
    calls = 0

    def stopping(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stop
        real(*args)

    monkeypatch.setattr(prepare_data, "write_shard", stopping)
    with pytest.raises(Stop):
        prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    prepare(source, "bytes", tmp_path / "out", shard_tokens=1000)
    train, val = find_shards(tmp_path / "out")
    assert val[0].name == "json_val_000000.bin"
    found = np.concatenate([open_shard(path, BYTES) for path in val + train])
    np.testing.assert_array_equal(found, stream_of(documents_of(60)))


@pytest.mark.needs("datasets")
def test_dataset_errors(tmp_path, monkeypatch, capsys) -> None:
    import datasets

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": "a", "number": 3}) + "\n")
    command = ["--tokenizer", "bytes", "--dataset", "json", "--data-files", str(rows), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "there is no column 'text' but ['body', 'number']; give one with --column" in capsys.readouterr().err
    # the right one, into the same folder
    assert main([*command, str(tmp_path / "out"), "--column", "body"]) == 0
    capsys.readouterr()
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("import datasets\n")
    assert main(["--tokenizer", "bytes", "--dataset", str(script), "--out", str(tmp_path / "out5")]) == 1
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: ") and str(script) in refusal and refusal.count("\n") == 1
    assert main([*command, str(tmp_path / "out2"), "--column", "number"]) == 1
    assert "document 0 is 3, not text" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out3"), "--split", "nosuch"]) == 1
    assert "split 'nosuch'" in capsys.readouterr().err

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fineweb = [
        "--dataset",
        "HuggingFaceFW/fineweb-edu",
        "--name",
        "sample-10BT",
        "--out",
        str(tmp_path / "out4"),
    ]
    assert main(fineweb) == 1
    message = capsys.readouterr().err
    assert "'HuggingFaceFW/fineweb-edu' (name 'sample-10BT', split 'train') cannot be read" in message
    assert "check the id and the network, then run the same command again" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(fineweb) == 1
    assert "pip install 'celo2[train]'" in capsys.readouterr().err


@pytest.mark.needs("datasets")
def test_rows_without_text_are_blank_documents(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in ["one", None, "two", ""]))
    prepare(DatasetRows("json", data_files=(str(rows),)), "bytes", tmp_path / "out")
    (train,), (val,) = find_shards(tmp_path / "out")
    found = np.concatenate([open_shard(train, BYTES), open_shard(val, BYTES)])
    np.testing.assert_array_equal(found, stream_of(["one", "two"]))


def test_dataset_options_need_a_dataset(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--embedded", "--name", "sample-10BT", "--out", str(tmp_path)])
    assert "--name belongs to --dataset" in capsys.readouterr().err


# embedded corpus


@pytest.mark.needs("tiktoken")
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_embedded_corpus(tmp_path, name: str) -> None:
    folder = prepare_embedded(name, tmp_path / "out")
    tokenizer = get_tokenizer(name)
    (train,), (val,) = find_shards(folder)
    shards = [open_shard(path, tokenizer.vocab_id) for path in (train, val)]
    # 101 articles, 5 of them held out
    assert [int((shard == tokenizer.eot).sum()) for shard in shards] == [96, 5]
    assert all(shard[0] == tokenizer.eot for shard in shards)
    total = sum(len(shard) for shard in shards)
    assert 0.02 < len(shards[1]) / total < 0.09
    with lzma.open(EMBEDDED_TEXT, "rt", encoding="utf-8") as file:
        articles = file.read().split("\n\n\n")
    text_bytes = sum(len(article.encode()) for article in articles)
    assert sum(int(tokenizer.token_bytes()[np.asarray(shard)].sum()) for shard in shards) == text_bytes
    before = contents(folder)
    prepare_embedded(name, folder)
    assert contents(folder) == before


def test_runs_as_a_script(tmp_path) -> None:
    script = Path(prepare_data.__file__)
    out = tmp_path / "out"
    command = [sys.executable, str(script), "--embedded", "--tokenizer", "bytes", "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "2 shards" in done.stdout
    # no progress bar away from a terminal
    assert done.stderr == ""


# what else users give


def compressed(content: bytes, how: str) -> bytes:
    return {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "plain": bytes}[how](content)


@pytest.mark.parametrize("how", ["plain", "gz", "xz", "bz2"])
@pytest.mark.parametrize("name", ["a.TXT.GZ", "a.txt", "a"])
def test_compression_is_known_by_content(tmp_path, how: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(compressed("Eins\n\n\nZwölf\n".encode(), how))
    assert list(TextFiles((path,)).documents(0)) == ["Eins", "Zwölf"]


def test_zstandard_without_a_library_says_what_to_install(tmp_path, monkeypatch) -> None:
    import importlib

    path = tmp_path / "a.txt"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"0" * 20)

    def fail(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ValueError, match="is compressed by Zstandard: pip install zstandard"):
        list(TextFiles((path,)).documents(0))


@pytest.mark.parametrize("how", ["plain", "gz"])
def test_json_lines_are_documents(tmp_path, how: str) -> None:
    rows = [{"text": "One\n\n\n\nstill one"}, {"text": None}, {"id": 3, "text": "Two"}]
    path = tmp_path / "x.txt"
    path.write_bytes(compressed("\n".join(json.dumps(row) for row in rows).encode(), how))
    assert list(TextFiles((path,)).documents(0)) == ["One\n\n\n\nstill one", "", "Two"]
    path.write_text(json.dumps({"content": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"number 1 has no \"text\".*--dataset json --data-files .* --column NAME"):
        list(TextFiles((path,)).documents(0))
    path.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="of JSON line 1 is 3, not text"):
        list(TextFiles((path,)).documents(0))
    # braces alone are text
    path.write_text("{ not json\n")
    assert list(TextFiles((path,)).documents(0)) == ["{ not json"]


def test_archives_pipes_and_folders_are_refused_by_name(tmp_path, capsys) -> None:
    import os
    import tarfile
    import zipfile

    text = text_file(tmp_path)
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        tar.add(text)
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.write(text)
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (
        ("t.tar.gz", "is a tar archive; unpack it"),
        ("t.zip", "is a zip archive; unpack it"),
        ("pipe", "is a pipe, which cannot be read twice; write the text to a file"),
        (".", "is a folder"),
    ):
        arguments = ["--tokenizer", "bytes", "--text", str(tmp_path / name), "--out", str(tmp_path / "out")]
        assert main(arguments) == 1
        assert expected in capsys.readouterr().err
        # nothing was begun: what is right goes to the same folder
    assert main(["--tokenizer", "bytes", "--text", str(text), "--out", str(tmp_path / "out")]) == 0


def test_a_separator_and_the_hint_of_it(tmp_path, capsys) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\n\n\n\nstill one\n<|endoftext|>\nTwo<|endoftext|>Three\n<|endoftext|>\n")
    with_it = ["--tokenizer", "bytes", "--text", str(path), "--out", str(tmp_path / "with")]
    assert list(TextFiles((path,), "<|endoftext|>").documents(0)) == ["One\n\n\n\nstill one", "Two", "Three"]
    assert main([*with_it, "--separator", "<|endoftext|>"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main([*with_it[:-1], str(tmp_path / "without")]) == 0
    assert capsys.readouterr().err.count("give --separator '<|endoftext|>'") == 1
    with pytest.raises(SystemExit):
        main(["--tokenizer", "bytes", "--embedded", "--separator", "x", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("where", [10, 100_000, 3_000_000])
def test_a_wrong_byte_is_named_by_its_place_in_the_file(tmp_path, where: int) -> None:
    content = bytearray("ä line of text\n".encode() * 250_000)
    while content[where] > 127 or content[where - 1] > 127:
        where += 1
    content[where] = 0xFF
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt: not UTF-8 text .* at byte {where}\\)"):
        list(TextFiles((path,)).documents(0))


def test_a_damaged_deflate_stream_is_named(tmp_path) -> None:
    content = bytearray(gzip.compress(np.random.default_rng(0).bytes(100_000).hex().encode()))
    content[40:60] = b"\xff" * 20
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz: the compressed file is damaged or cut short"):
        list(TextFiles((path,)).documents(0))
    whole = bz2.compress(b"text " * 100_000)
    path.write_bytes(whole[:50] + b"\0\0\0" + whole[53:])
    with pytest.raises(ValueError, match=r"a\.gz: the compressed file is damaged or cut short"):
        list(TextFiles((path,)).documents(0))


def test_changed_text_is_refused_and_older_folders_go_on(tmp_path) -> None:
    path = tmp_path / "a.txt"
    content = bytearray(b"word " * 500_000)
    path.write_bytes(content)
    prepare(TextFiles((path,)), "bytes", tmp_path / "out")
    # as it was written before more than the beginning was compared
    progress = tmp_path / "out" / PROGRESS_FILE
    stored = json.loads(progress.read_text())
    old = json.loads(progress.read_text())
    del old["arguments"]["source"]["files"][0]["sha256"]
    progress.write_text(json.dumps(old))
    assert prepare(TextFiles((path,)), "bytes", tmp_path / "out").unchanged
    progress.write_text(json.dumps(stored))
    content[-7:-3] = b"edit"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was prepared with other arguments or data"):
        prepare(TextFiles((path,)), "bytes", tmp_path / "out")


@pytest.mark.needs("datasets")
def test_changed_data_files_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents_of(30)))
    source = DatasetRows("json", data_files=(str(path),))
    prepare(source, "bytes", tmp_path / "out")
    assert prepare(source, "bytes", tmp_path / "out").unchanged
    path.write_text(path.read_text().replace("word", "wird"))
    with pytest.raises(ValueError, match="was prepared with other arguments or data"):
        prepare(source, "bytes", tmp_path / "out")


def test_a_start_that_came_to_nothing_is_no_run(tmp_path) -> None:
    blank, good = tmp_path / "blank.txt", text_file(tmp_path)
    blank.write_text("\n\n")
    with pytest.raises(ValueError, match="has no text"):
        prepare(TextFiles((blank,)), "bytes", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    # as an older version left it
    (tmp_path / "out" / PROGRESS_FILE).write_text(json.dumps({"arguments": {"a": 1}, "shards": [], "complete": False}))
    assert len(prepare(TextFiles((good,)), "bytes", tmp_path / "out").shards) == 2


@pytest.mark.parametrize("inside", ["", "shards", "a/b"])
def test_shards_within_the_dataset_are_refused(tmp_path, monkeypatch, inside: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the folder of --dataset owner/name, or within it"):
        prepare(DatasetRows("owner/name"), "bytes", Path("owner/name") / inside)
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_unicode_shows_what_it_can(tmp_path) -> None:
    import os

    out = tmp_path / "données"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "celo2.pretrain.prepare_data", "--tokenizer", "bytes"),
            *("--text", str(text_file(tmp_path)), "--out", str(out)),
        ],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert ran.returncode == 0 and b"prepared: 2 shards" in ran.stdout and not ran.stderr
