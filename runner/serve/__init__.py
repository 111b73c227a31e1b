"""`moe-edge serve`: one engine behind the HTTP dialects that programs already speak."""
