"""Files to tensors and back: data sets, the order of training, pictures; and `python data.py prepare`.

A data set has len(), read(i) -> uint8 (size, size, 3), labels ((n,) int64, or None), name(i), and class_names
(empty where the source has only numbers).
There are three: `Shapes` (drawn), `Files` (a folder or a zip of pictures), `Arrays` (an .npz, the CIFAR
archives). `Stream` puts one in the endless order that training reads it in.
"""
import argparse
import colorsys
import contextlib
import io
import json
import math
import os
import signal
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
KINDS = ("'shapes', a folder of images (sub-folders are classes), a .zip of images, an .npz, "
         "or a CIFAR-10/100 binary archive")


# ---------------------------------------------------------------------------------------------
# One picture

def decode(file):
    """An opened image file -> PIL image, RGB, upright; transparency is laid on white. For a broken file it raises
    what Pillow raises, which can be nearly anything."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):                                         # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop: halve with a box filter while the short side is at least 2 x size, then bicubic, then cut the
    middle. PIL image -> uint8 (size, size, 3)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        size_now = round(image.width * scale), round(image.height * scale)
        image = image.resize(size_now, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------------------------------------
# Data sets

def around(n, radius=1.0, phase=0.0):
    """n points evenly on a circle, the first at the top, y down: (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n + phase
    return radius * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def outlines():
    """The ten shapes in the unit circle: name -> polygons to draw in turn, each (points (K, 2), 1 to fill or 0 to cut
    out)."""
    u = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    heart = np.stack([16 * np.sin(u) ** 3,
                      -13 * np.cos(u) + 5 * np.cos(2 * u) + 2 * np.cos(3 * u) + np.cos(4 * u)], axis=1)
    star = np.stack([around(5), around(5, 0.42, np.pi / 5)], axis=1).reshape(10, 2)
    upright = np.array([(-0.33, -0.95), (0.33, -0.95), (0.33, 0.95), (-0.33, 0.95)])
    bar = np.array([(-0.9, -0.17), (0.9, -0.17), (0.9, 0.17), (-0.9, 0.17)])
    return {
        "circle":   [(around(48, 0.9), 1)],
        "square":   [(around(4, 1.1, np.pi / 4), 1)],
        "triangle": [(around(3), 1)],
        "star":     [(star, 1)],
        "cross":    [(upright, 1), (upright[:, ::-1], 1)],
        "ring":     [(around(48), 1), (around(48, 0.55), 0)],
        "diamond":  [(around(4) * (0.6, 1.0), 1)],
        "heart":    [(heart / 17, 1)],
        "moon":     [(around(48), 1), (around(48, 0.85) + (0.5, -0.1), 0)],
        "bars":     [(bar + (0, y), 1) for y in (-0.65, 0, 0.65)],
    }


class Shapes:
    """The built-in set: one bright shape of ten on a dark ground. Image i follows from (seed, i) alone and has class
    i % 10; size, place, tilt and colour are random. Drawn four times too large and averaged down for smooth edges."""
    outlines = outlines()
    class_names = list(outlines)

    def __init__(self, size=32, n=50_000, seed=0):
        self.size, self.n, self.seed = size, n, seed
        self.labels = np.arange(n) % len(self.class_names)

    def __len__(self):
        return self.n

    def name(self, i):
        return f"shape {i}"

    def read(self, i):
        rng = np.random.default_rng([self.seed, i])
        radius, tilt, hue, saturation, value, right, down = rng.uniform(
            [0.36, -0.2, 0, 0.75, 0.85, 0, 0], [0.45, 0.2, 1, 1, 1, 1, 1])
        ground = rng.uniform(0.2, 0.32, 3)
        turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        centre = radius + 0.02 + (0.96 - 2 * radius) * np.array([right, down])
        mask = Image.new("L", (4 * self.size, 4 * self.size))
        pen = ImageDraw.Draw(mask)
        for points, fill in self.outlines[self.class_names[self.labels[i]]]:
            pen.polygon(((points @ turn * radius + centre) * 4 * self.size).ravel().tolist(), fill=255 * fill)
        alpha = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255
        colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        return np.round(255 * (ground + alpha * (colour - ground))).astype(np.uint8)


class Files:
    """Pictures in a folder or in a .zip, read when asked for, cropped and resized to size.

    Classes: what dataset.json says ({"labels": [["path", class], ...]}, as in EDM), else the first level of
    sub-folders in alphabetical order (inside the one folder that holds everything, if there is one); pictures
    that lie in no sub-folder have none.
    ValueError if there are no pictures, or if the labels cannot be understood."""

    def __init__(self, path, size):
        self.path, self.size, self.archive, self.pid = Path(path), size, None, None
        if self.path.is_dir():
            found = (Path(top, name).relative_to(self.path).as_posix()
                     for top, _, names in os.walk(self.path, followlinks=True) for name in names)
        else:
            found = self.zip().namelist()
        hidden = (".", "__MACOSX")
        found = {n for n in found if not any(part.startswith(hidden) for part in n.split("/"))}
        self.names = sorted(n for n in found if Path(n).suffix.lower() in EXTENSIONS)
        if not self.names:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))}); --data takes {KINDS}")
        self.labels, self.class_names = self.find_labels("dataset.json" in found)

    def find_labels(self, described):
        if described:
            try:
                with self.open("dataset.json") as file:
                    labels = json.load(file)["labels"]
                if labels is None:
                    return None, []
                labels = {name: label for name, label in labels}
                chosen = [labels[name] for name in self.names]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"dataset.json in {self.path} does not give every image a label ({error!r}); "
                                 'expected {"labels": [["path", class], ...]}') from None
            if not all(type(label) is int and label >= 0 for label in chosen):
                raise ValueError(f"dataset.json in {self.path} has a label that is not a class number 0, 1, 2, ...")
            return np.array(chosen), []
        folders = [n.split("/")[:-1] for n in self.names]
        while all(len(f) > 1 and f[0] == folders[0][0] for f in folders):  # as when a whole folder was zipped
            folders = [f[1:] for f in folders]
        folders = [f[0] if f else None for f in folders]
        classes = sorted({f for f in folders if f is not None})
        if not classes:
            return None, []
        if None in folders:
            raise ValueError(f"{self.path} has images both beside and inside sub-folders, so their classes are "
                             f"unclear; put all of them in sub-folders, or none")
        return np.array([classes.index(f) for f in folders]), classes

    def zip(self):
        if self.archive is None or self.pid != os.getpid():                # a handle must not cross a fork
            self.archive, self.pid = zipfile.ZipFile(self.path), os.getpid()
        return self.archive

    def open(self, name):
        if self.path.is_dir():
            return open(self.path / name, "rb")
        return io.BytesIO(self.zip().read(name))

    def __getstate__(self):
        return {**self.__dict__, "archive": None}

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def read(self, i):
        with self.open(self.names[i]) as file:
            return center_crop(decode(file), self.size)


class Arrays:
    """Pictures held in memory: images (n, H, W, 3) uint8, labels (n,) or None."""

    def __init__(self, images, labels, size, class_names=()):
        self.images, self.labels, self.size, self.class_names = images, labels, size, list(class_names)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"image {i}"

    def read(self, i):
        image = self.images[i]
        if image.shape[0] == image.shape[1] == self.size:
            return image
        return center_crop(Image.fromarray(image), self.size)


def read_npz(path, size):
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("an .npz is a zip archive, and this is none")
    with np.load(path, allow_pickle=False) as file:
        if "arr_0" not in file:
            raise ValueError(f"{path} has no array arr_0 (found: {', '.join(file.files) or 'nothing'})")
        images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"arr_0 in {path} is {images.dtype} {images.shape}, not uint8 (n, height, width, 3)")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"arr_1 in {path} is {labels.dtype} {labels.shape}, not one class number 0, 1, ... for each "
                         f"of the {len(images)} images")
    return Arrays(images, None if labels is None else labels.astype(np.int64), size)


def read_cifar(path, size):
    """The training images of cifar-10-binary.tar.gz, or cifar-100-binary.tar.gz with its fine labels. A record is
    1 or 2 label bytes, then 3 x 32 x 32 pixels."""
    with tarfile.open(path) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
        batches = sorted(n for n in files if n.startswith("data_batch_") and n.endswith(".bin"))
        header, titles = (1, "batches.meta.txt") if batches else (2, "fine_label_names.txt")
        batches = batches or ["train.bin"]
        if batches[0] not in files:
            raise ValueError(f"{path} holds neither data_batch_1.bin (CIFAR-10) nor train.bin (CIFAR-100); "
                             f"take the binary version of the archive")
        raw = b"".join(tar.extractfile(files[n]).read() for n in batches)
        names = tar.extractfile(files[titles]).read().decode().split() if titles in files else []
    if not raw or len(raw) % (header + 3072):
        raise ValueError(f"{path}: {len(raw)} bytes are no whole number of {header + 3072}-byte CIFAR records")
    records = np.frombuffer(raw, np.uint8).reshape(-1, header + 3072)
    images = np.ascontiguousarray(records[:, header:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = records[:, header - 1].astype(np.int64)
    return Arrays(images, labels, size, names)


def open_dataset(path, size):
    """What --data names -> a data set of size x size images. ValueError, in one sentence, if it is missing, empty,
    damaged or of another kind."""
    path, low = str(path), str(path).lower()
    if path == "shapes":
        return Shapes(size)
    if not os.path.exists(path):
        raise ValueError(f"there is no data at {path!r}; --data takes {KINDS}")
    readers = {".zip": Files, ".npz": read_npz, ".tar.gz": read_cifar, ".tgz": read_cifar, ".tar": read_cifar}
    reader = Files if os.path.isdir(path) else next((r for end, r in readers.items() if low.endswith(end)), None)
    if reader is None:
        raise ValueError(f"cannot tell what {path!r} holds; --data takes {KINDS}")
    try:
        return reader(path, size)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or incomplete; fetch or make it "
                         f"again") from None


# ---------------------------------------------------------------------------------------------
# The order of training

class Stream(torch.utils.data.Dataset):
    """A data set in training order: place 0, 1, 2, ... without end -> uint8 (3, size, size), label, unreadable.

    Each run of n places is one shuffle of the n images. What comes at a place, and whether it is mirrored,
    depends on (seed, place) alone: there is nothing to save for a resume, and neither the number of
    processes nor of workers changes it. An unreadable image gives way to the next one of the shuffle;
    `unreadable` lists (name, reason) of those passed over."""

    def __init__(self, dataset, seed=0, xflip=False):
        self.dataset, self.seed, self.xflip, self.epoch, self.order = dataset, seed, xflip, None, None

    def __getitem__(self, place):
        n = len(self.dataset)
        epoch, k = divmod(place, n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(n)
        unreadable = []
        while True:
            i = self.order[(k + len(unreadable)) % n]
            try:
                image = self.dataset.read(i)
                break
            except Exception as error:
                unreadable.append((self.dataset.name(i), reason(error)))
            if len(unreadable) > allowed(n):                               # the list alone is enough to stop the run
                image = np.zeros((self.dataset.size, self.dataset.size, 3), np.uint8)
                break
        if self.xflip and np.random.default_rng([self.seed, 1, place]).random() < 0.5:
            image = image[:, ::-1]
        label = -1 if self.dataset.labels is None else int(self.dataset.labels[i])
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), label, unreadable


def collate(items):
    images, labels, unreadable = zip(*items)
    return torch.stack(images), torch.tensor(labels), sum(unreadable, [])


def outlive_the_signal(_):
    """In a worker: Ctrl-C, and the SIGTERM that a cluster sends to every process, are the main process's to handle,
    which needs this worker until its step is done. A second SIGTERM ends it, as torch may wish to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over `batches`, an iterable of lists of places -> images (b, 3, H, W) uint8, labels (b,),
    unreadable."""
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       worker_init_fn=outlive_the_signal, pin_memory=pin_memory,
                                       prefetch_factor=4 if workers else None)


def reason(error):
    """What went wrong with an image, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def allowed(n):
    """How many of n images may be unreadable: 1 %, and one is always forgiven."""
    return max(1, n // 100)


class Unreadable:
    """Names and counts the images that could not be read. ValueError, with the list, past what is allowed."""

    def __init__(self, dataset, speaks=True):
        self.found, self.total, self.speaks = {}, len(dataset), speaks

    def add(self, unreadable):
        for name, why in unreadable:
            if name not in self.found:
                self.found[name] = why
                if self.speaks:
                    print(f"skipped {name}: {why}", file=sys.stderr, flush=True)
        if len(self.found) > allowed(self.total):
            raise ValueError(f"{len(self.found)} of {self.total} images cannot be read, more than 1 %; mend or "
                             f"remove them: " + ", ".join(self.found))


# ---------------------------------------------------------------------------------------------
# Tensors to pictures

def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 numpy."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images):
    """(B, H, W, 3) uint8 numpy -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_grid(images, path, columns=None):
    """uint8 (n, H, W, 3) -> one picture, row by row; images under 64 pixels are enlarged."""
    n, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, zoom, gap = math.ceil(n / columns), max(1, 64 // width), 2
    grid = np.full((rows * (zoom * height + gap) + gap, columns * (zoom * width + gap) + gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        top = gap + k // columns * (zoom * height + gap)
        left = gap + k % columns * (zoom * width + gap)
        grid[top:top + zoom * height, left:left + zoom * width] = image.repeat(zoom, 0).repeat(zoom, 1)
    save_image(Image.fromarray(grid), path)


def save_image(image, path):
    with written_whole(path) as temporary:
        image.save(temporary, format=Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"))


@contextlib.contextmanager
def written_whole(path):
    """A temporary name beside path to write to. It is renamed to path at the end, and removed if anything fails:
    path holds all of the new content, or what it held before."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def live_line(text):
    """Progress on a terminal, over the line that stands there; elsewhere nothing."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# python data.py prepare SRC DEST.zip --size 64

def prepare(source, dest, size, workers=2):
    """Crop, resize and pack any data that training reads into an uncompressed .zip of PNGs with a dataset.json. The
    file appears when it is complete; one that exists is left alone (ValueError)."""
    dest = Path(dest)
    if dest.suffix != ".zip":
        raise ValueError(f"{dest} does not end in .zip, which is what prepare writes")
    if dest.exists():
        raise ValueError(f"{dest} exists; remove it or choose another name")
    if not dest.parent.is_dir():
        raise ValueError(f"the folder {dest.parent} for {dest.name} does not exist; make it first")
    dataset = open_dataset(source, size)
    labels, unreadable = [], Unreadable(dataset)
    batches = (range(i, min(i + 64, len(dataset))) for i in range(0, len(dataset), 64))
    packed = torch.utils.data.DataLoader(Packer(dataset), batch_sampler=batches, num_workers=workers,
                                         collate_fn=Packer.collate)
    with written_whole(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out:
        for files, bad in packed:
            unreadable.add(bad)
            for png, label in files:
                name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                out.writestr(name, png)
                labels.append([name, label])
            live_line(f"{len(labels)} of {len(dataset)} images")
        known = labels if dataset.labels is not None else None
        out.writestr("dataset.json", json.dumps({"labels": known}))
    classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
    live_line("\n")
    print(f"{dest}: {len(labels)} images of {size} x {size}, {classes} classes, "
          f"{len(unreadable.found)} unreadable images left out", file=sys.stderr)


class Packer(torch.utils.data.Dataset):
    """Place i of a data set -> (PNG bytes, label), or None and the reason why it cannot be read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        try:
            out = io.BytesIO()
            Image.fromarray(self.dataset.read(i)).save(out, "png")
        except Exception as error:
            return None, (self.dataset.name(i), reason(error))
        return (out.getvalue(), None if self.dataset.labels is None else int(self.dataset.labels[i])), None

    @staticmethod
    def collate(items):
        files, unreadable = zip(*items)
        return [f for f in files if f], [u for u in unreadable if u]


def main():
    parser = argparse.ArgumentParser(description="Prepare data for training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare")
    command = commands.add_parser("prepare", help="crop, resize and pack images into a zip", allow_abbrev=False)
    command.add_argument("source", metavar="SRC", help=KINDS)
    command.add_argument("dest", metavar="DEST.zip")
    command.add_argument("--size", type=int, required=True, help="height and width in pixels")
    command.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    parser.error = command.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    args = parser.parse_args()
    try:
        if args.size < 1:
            raise ValueError(f"--size {args.size} is no size; give a number of pixels from 1")
        prepare(args.source, args.dest, args.size, args.workers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ndata.py: stopped\n")


if __name__ == "__main__":
    main()
