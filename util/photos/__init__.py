"""Photos of users: reading them, and writing what was found in them."""

KINDS = ("coco", "coco-rle", "labelme", "yolo", "label-studio")  # of exports, see util.photos.polygons
