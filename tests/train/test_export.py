"""Folders of twins: written whole or not at all, over nothing that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unisonde.train.export import new_folder, save_weights


def test_what_fails_half_way_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "twin"
    with pytest.raises(OSError, match="full"), new_folder(out, "vae") as folder:
        assert (folder / "vae").is_dir() and folder != out
        raise OSError("the disk is full")
    assert not out.exists()
    with new_folder(out, "vae") as folder:  # what was left behind is no hindrance, nor part of it
        assert list(folder.iterdir()) == [folder / "vae"]
        (folder / "vae" / "a").write_text("b")
    assert (out / "vae" / "a").read_text() == "b" and [p.name for p in tmp_path.iterdir()] == ["twin"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="already holds files; name another folder"), new_folder(tmp_path) as folder:
        (folder / "other").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_weights_are_halved_and_whole_numbers_kept(tmp_path: Path) -> None:
    save_weights({"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1 << 20])}, tmp_path / "w.safetensors")
    held = load_file(tmp_path / "w.safetensors")
    assert held["a"].dtype == torch.float16 and torch.equal(held["a"], torch.arange(6).view(2, 3).T.half())
    assert held["b"].dtype == torch.int64 and held["b"].item() == 1 << 20
