"""Other words, other answer classes, more splits, repaired images: new tables, stored images are kept."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data import h5_file
from data.h5_file import H5Images, Store, partial_path
from data.vqa_files import SplitFiles
from experiments.prepare import split_files
from experiments.process_group import Processes
from experiments.tasks.vqa import VQATask
from experiments.training.stage_cache import choose_images
from experiments.training.train import train
from tests.calls import interrupt
from tests.conftest import ROOT
from tests.raw_files import KILLED_IN_A_FLUSH, make, many, write_split
from vqa.io.errors import InputError
from vqa.io.images import decode_image
from vqa.settings.recipes import load_settings


@pytest.fixture
def made(raw, tmp_path):
    """The file of `raw`, and a second name of it: what is done to the file itself is seen there."""
    make(raw, tmp_path / "data.h5")
    os.link(tmp_path / "data.h5", tmp_path / "old.h5")
    return tmp_path / "data.h5"


def checksums(path) -> list[int]:
    return Store(path).checksums.tolist()


@pytest.mark.parametrize("changed", [{"answers": 2}, {"min_word_count": 2}, {"vocabulary_from": ["train", "val"]}])
def test_other_words_or_answers_decode_nothing(raw, made, tmp_path, decoded, capsys, changed):
    before = made.read_bytes()
    for file in raw.values():
        for image in (1, 2, 3):
            file.image(image).unlink(missing_ok=True)  # they are not needed any more
    capsys.readouterr()
    make(raw, made, **changed)
    assert f"{made}: its 3 images are kept" in capsys.readouterr().out
    assert decoded == []
    assert (tmp_path / "old.h5").read_bytes() == before  # what was complete is not written to
    assert checksums(made) == checksums(tmp_path / "old.h5")
    assert not partial_path(made).exists()
    make(raw, made)
    assert made.read_bytes() == before


def test_other_images_under_the_same_names_are_other_data_to_learn_from(raw, made, tmp_path):
    Image.new("RGB", (40, 30)).save(raw["train"].image(1))
    make(raw, tmp_path / "other.h5")
    one, other = Store(made), Store(tmp_path / "other.h5")
    assert one.provenance == other.provenance
    assert one.identity(["train"]) != other.identity(["train"])


def test_an_added_split_decodes_its_own_images_alone(raw, made, tmp_path, decoded):
    before, reader, old = made.read_bytes(), H5Images(made), Store(made)
    test = write_split(tmp_path, "test", [(30, 7, "Is it?", ["yes"]), (31, 8, "And?", ["no"])])
    make({"test": test, **raw}, made)
    assert decoded == [test.image(7), test.image(8)]
    assert (tmp_path / "old.h5").read_bytes() == before
    assert checksums(made)[:3] == checksums(tmp_path / "old.h5")
    new = Store(made)
    assert new.table("train").images.tolist() == [0, 0, 1]
    assert new.table("test").images.tolist() == [3, 4]
    # a reader of the old one continues with the new one, or gets an error
    assert np.array_equal(reader[1], decode_image(raw["train"].image(2), 32))
    with pytest.raises(InputError, match=r"data.h5: was replaced while this command ran; run it again"):
        old.table("val")
    decoded.clear()
    make(raw | {"test": test}, tmp_path / "fresh.h5")
    assert made.read_bytes() == (tmp_path / "fresh.h5").read_bytes()
    make(raw | {"test": test}, made)
    assert len(decoded) == 5  # of the fresh one


def test_a_run_takes_no_images_of_a_file_that_is_made_anew_meanwhile(tiny, raw, tmp_path):
    h5 = Path(shutil.copy(tiny.parent / "world.h5", tmp_path / "copy.h5"))
    task = VQATask(load_settings(tiny, [f"data.h5={h5}", "data.cache_gib=0.0"]))
    images = choose_images(task, task.new_model(fresh=True, say=print).resnet, Processes()).images
    whole = pickle.loads(pickle.dumps(images))[3]  # as in a worker process
    splits, asked = split_files(task.settings), {"min_word_count": 2, "answers": 20}
    make(splits | {"again": splits["val"]}, h5, image_size=64, **asked)
    assert np.array_equal(pickle.loads(pickle.dumps(images))[3], whole)
    known = Store(h5).checksums
    known[2] ^= 1
    with pytest.raises(InputError, match="copy.h5: was replaced by other images/pixels while this command ran"):
        H5Images(h5, known)[1]
    known[2] = 0  # of a stand-in, which may have been mended
    assert np.array_equal(H5Images(h5, known)[2], H5Images(h5)[2])
    for other, size in ((splits, 32), (raw, 64)):
        h5.unlink()
        make(other, h5, image_size=size, **asked | {"min_word_count": 1})
        with pytest.raises(InputError, match="copy.h5: was replaced by other images/pixels while this command ran"):
            pickle.loads(pickle.dumps(images))[1]


def test_images_are_kept_when_their_folder_moves(raw, made, decoded):
    moved = {
        name: SplitFiles(files.questions, files.annotations, f"elsewhere/{'/'.join(Path(files.images).parts[-2:])}")
        for name, files in raw.items()
    }
    make(moved, made, answers=3)
    assert decoded == []


def test_a_kill_while_images_are_copied_keeps_what_was_marked(tmp_path, decoded):
    splits, path = many(tmp_path, 100), tmp_path / "data.h5"
    make(splits, path)
    whole = path.read_bytes()
    make(splits, tmp_path / "expected.h5", answers=1)
    decoded.clear()
    for flush, kept in ((1, None), (3, 0), (1, 0), (2, 16), (3, 48)):  # as when images are decoded
        script = KILLED_IN_A_FLUSH.replace("answers=10", "answers=1")
        ended = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(flush)], cwd=ROOT, check=False)
        assert ended.returncode == -9
        assert path.read_bytes() == whole
        if kept is not None:
            with h5py.File(partial_path(path)) as file:
                assert file["images/filled"][:].sum() == kept
    make(splits, path, answers=1)
    assert decoded == []
    assert path.read_bytes() == (tmp_path / "expected.h5").read_bytes()


def test_the_disk_needs_room_for_both(raw, made, left):
    before = made.read_bytes()
    left(3 * 32**2 * 3)
    with pytest.raises(InputError, match=r"data.h5.partial: needs .* left; make room or name another data.h5"):
        make(raw, made, answers=2)
    assert made.read_bytes() == before
    assert not partial_path(made).exists()


def test_a_damaged_image_is_decoded_and_not_copied(raw, made, decoded, capsys):
    content = bytearray(made.read_bytes())
    with h5py.File(made) as file:
        content[file["images/pixels"].id.get_offset() + 32 * 32 * 3] ^= 1
    whole = checksums(made)
    made.write_bytes(content)
    make(raw, made, answers=2)
    assert "1 image(s) are damaged and decoded again" in capsys.readouterr().out
    assert decoded == [raw["train"].image(2)]
    assert checksums(made) == whole
    assert np.array_equal(H5Images(made)[1], decode_image(raw["train"].image(2), 32))


def test_mended_images_are_decoded_and_no_others(raw, made, tmp_path, decoded, capsys):
    path, (one, three) = tmp_path / "some.h5", (raw["train"].image(1), raw["val"].image(3))
    whole = {file: file.read_bytes() for file in (one, three)}
    one.unlink()
    three.write_bytes(b"no image")
    make(raw, path, skip_bad_images=True)
    assert "complete, 0.0 MB; 2 of its 3 images were missing or unreadable" in capsys.readouterr().out
    before, said = path.read_bytes(), r"2 image\(s\) missing or unreadable, by id: 1, 3; repair them, or skip them"
    decoded.clear()
    with pytest.raises(InputError, match=said):
        make(raw, path)
    assert not partial_path(path).exists()  # nothing was to be gained
    one.write_bytes(whole[one])
    make(raw, path, skip_bad_images=True)
    assert "nothing to do; 2 of its 3 images were missing or unreadable" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"1 image\(s\) missing or unreadable, by id: 3;"):
        make(raw, path)
    assert path.read_bytes() == before
    make(raw, path, skip_bad_images=True)  # what was repaired by now
    assert Store(path).usable.tolist() == [True, True, False]
    three.write_bytes(whole[three])
    make(raw, path)
    assert decoded == [one, three, one, one, three, three, three, three]
    assert path.read_bytes() == made.read_bytes()


def test_stand_ins_of_a_stopped_run_are_no_longer_taken(raw, made, tmp_path, monkeypatch):
    path, image = tmp_path / "some.h5", raw["train"].image(1)
    whole = image.read_bytes()
    image.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(h5_file, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(raw, path, skip_bad_images=True)
    with pytest.raises(InputError, match="1 image"):
        make(raw, path)
    image.write_bytes(whole)
    make(raw, path)
    assert path.read_bytes() == made.read_bytes()


def test_stored_maps_and_runs_outlive_what_does_not_concern_them(tiny, tmp_path, capsys):
    h5 = shutil.copy(tiny.parent / "world.h5", tmp_path / "copy.h5")
    settings = load_settings(tiny, ["name=mine", f"data.h5={h5}", "cbn.stages=[]", "train.checkpoint_every=1"])
    run = train(settings, runs=tmp_path).path
    assert list(tmp_path.glob("copy_stage*.h5"))
    images = Store(h5).images_identity
    splits = split_files(settings)
    asked = {"image_size": 64, "min_word_count": settings.data.min_word_count, "answers": settings.data.answers}
    make(splits | {"again": splits["val"]}, h5, **asked)
    assert Store(h5).splits == ["again", "train", "val"]
    assert Store(h5).images_identity == images
    train(settings, resume=True, runs=tmp_path)
    assert f"{run}: finished, nothing to do" in capsys.readouterr().out
    make(splits | {"again": splits["val"]}, h5, **asked | {"answers": 3})
    other = load_settings(tiny, ["name=other", f"data.h5={h5}", "cbn.stages=[]", "data.answers=3"])
    train(other, runs=tmp_path)  # reads the same maps
    with pytest.raises(InputError, match=r"copy.h5: made with answers 3, but data.answers is"):
        train(settings, resume=True, runs=tmp_path)
