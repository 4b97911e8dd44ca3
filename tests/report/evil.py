"""Texts that would be markup on a page that forgot to escape them."""

EVIL = '<script>window.hurt = 1</script> & "two" \'quotes\' </title></svg><img src=x onerror="window.hurt=1">'
EVIL_BRAND, EVIL_CATEGORY = '"><b onclick=hurt()>Brand', "<style>*{display:none}</style> Tools"
LIKE_DRAWING = "Lamp #000001 in #000042, xlink:href"
"""A text that looks like parts of a drawing."""
