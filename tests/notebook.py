"""A notebook as a script: predictions of the three tasks, of an image or a text in all its forms.

python tests/notebook.py DETECTOR CLASSIFIER TRANSLATOR, from a folder with photo.png and phrases.txt. It prints the
records as JSON, for the test that runs it. Each `# %%` begins a cell.
"""

# %%
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.train.assembly import load

detector, classifier, translator = sys.argv[1:]
image = Image.open("photo.png")
array = np.array(image)

# %% Objects in an image
model, task = load(detector, "task.predict.threshold=0")
objects = task.predict(model, image)

# %% The same image as an array, a tensor and a path
assert task.predict(model, array) == task.predict(model, array / 255) == objects
assert task.predict(model, torch.tensor(array).permute(2, 0, 1)) == objects
assert task.predict(model, "photo.png") == task.predict(model, Path("photo.png")) == objects
assert task.predict(model, [image, "photo.png"]) == [objects, objects]

# %% Jupyter shows the picture
assert objects._repr_png_().startswith(b"\x89PNG")
assert [record.keys() for record in objects] == [{"box", "name", "score"}] * len(objects) and objects

# %% Classes of the image
model, task = load(classifier, "task.predict.top=3")
classes = task.predict(model, image)
assert task.predict(model, array) == task.predict(model, "photo.png") == classes
assert task.predict(model, [image, array]) == [classes, classes]
assert classes._repr_png_().startswith(b"\x89PNG") and len(classes) == 3 and classes[0].keys() == {"name", "share"}

# %% A translation, and those of a list and of a file
model, task = load(translator)
translation = task.predict(model, "3 hours ago")
assert translation[0].keys() == {"text", "score"} and "3 hours ago" in translation._repr_html_()
phrases = task.predict(model, Path("phrases.txt"))
assert [records[0]["text"] for records in task.predict(model, Path("phrases.txt").read_text().splitlines())] == [
    records[0]["text"] for records in phrases
]

# %% A path is not a sentence, nor is an image
for mistake in (image, ["3 hours ago", array]):
    try:
        task.predict(model, mistake)
    except UserError as error:
        assert "A sentence (str), a list of sentences" in str(error)
    else:
        raise AssertionError(mistake)

print(json.dumps({"objects": objects, "classes": classes, "translation": translation, "phrases": phrases}))
