"""From public checkpoint layouts to a model directory; see docs/convert.md."""
