"""`laserrec serve`: recommendations over HTTP (extra `serve`). See docs/serving.md."""
