"""The accuracy of every question: by its official id, whatever the order of the questions."""

import numpy as np

from data.batches import QuestionDataset
from experiments import evaluate


def test_the_accuracies_of_questions_are_in_the_order_of_their_ids(trained, tmp_path, monkeypatch):
    split_data = evaluate.split_data

    def turned(*given):
        data = split_data(*given)
        return QuestionDataset(data.table.select(np.arange(len(data))[::-1]), data.images)

    found = []
    for name, read in (("straight", split_data), ("turned", turned)):
        monkeypatch.setattr(evaluate, "split_data", read)
        evaluate.evaluate(trained, "val", tmp_path / name, per_question=True)
        found.append(np.load(tmp_path / name / "accuracies_val.npz"))
    assert not np.array_equal(found[0]["accuracies"], found[0]["accuracies"][::-1])
    for part in ("ids", "accuracies"):
        assert np.array_equal(found[0][part], found[1][part])
    assert np.array_equal(found[0]["ids"], np.sort(found[0]["ids"]))
