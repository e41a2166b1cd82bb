"""What a processor asks of its image processor is asked again for the high-res view."""

from collections import ChainMap
from typing import Any

from transformers.image_utils import make_flat_list_of_images

from flexkit.encoding import PictureSource
from flexkit.grids import Grid, Pair
from flexkit.processing.outputs import appended, named
from flexkit.processing.overviews import counting_overviews, keep_overviews, to_one_tile, without_tiles
from flexkit.processing.reading import read_images, read_pixels
from flexkit.processing.source_overviews import as_source, source_of
from flexkit.processing.views import choose_tiled_view, choose_view
from flexkit.processing.views.videos import in_both_views

__all__ = ["tap"]


def tap(processor: Any, zooms: tuple[Pair, ...], video_zoom: Grid) -> tuple[Any, dict[str, Any]]:
    """A copy of a processor that does the same, and a place for the high-res inputs that it makes on the way.

    The processor itself stays as it is, so that calls from several threads do not meet.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        A processor with an image processor.
    zooms : tuple of tuple of int
        Along rows and columns, of each level.
    video_zoom : tuple of int
        Of videos, along frames, rows and columns.

    Returns
    -------
    processor : transformers.ProcessorMixin
        The copy, for one call. Where the processor cuts images into tiles, the copy gives overviews alone.
    high_res : dict
        Empty until the copy processes images or videos, then the high-res inputs.
    """
    image_processor = processor.image_processor
    view = choose_view(image_processor)
    high_res: dict[str, Any] = {}

    def fetch_images(images: Any) -> Any:
        return read_images(images, image_processor)

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        images = fetch_images(images)
        options = {**options, **without_tiles(image_processor, options)}
        settings = ChainMap(options, vars(image_processor))
        reading = {name: settings.get(name) for name in ("do_convert_rgb", "input_data_format")}
        flat = make_flat_list_of_images(images)
        pixels = [read_pixels(image, image_processor, **reading) for image in flat]
        shown = to_one_tile(image_processor, images, pixels)
        as_read = {} if shown is images else {"input_data_format": "channels_first"}
        made = image_processor.preprocess(shown, *args, **{**options, **as_read})
        low_res = named(made)
        keep_overviews(image_processor, low_res)
        sources = [source_of(image) for image in flat]
        if len(zooms) > 1 or any(sources):
            tiled = choose_tiled_view(image_processor)
            # What PIL has decoded as a whole is read as it would be without tiles.
            in_memory = [source is None or isinstance(source, PictureSource) for source in sources]
            whole = [
                as_source(image) if decoded else source
                for source, image, decoded in zip(sources, pixels, in_memory, strict=True)
            ]
            views = tiled(image_processor, whole, low_res, options, zooms) if pixels else {}
        else:
            views = view(image_processor, pixels, low_res, options, zooms[0]) if pixels else {}
        for name, value in views.items():  # IDEFICS comes with the images of every text
            high_res[name] = appended(high_res[name], value) if name in high_res else value
        return made

    tapped = counting_overviews(processor)
    tapped.image_processor.fetch_images = fetch_images
    tapped.image_processor.preprocess = preprocess
    if getattr(processor, "video_processor", None) is not None:
        tapped.video_processor = in_both_views(processor.video_processor, video_zoom, high_res)
    return tapped, high_res
