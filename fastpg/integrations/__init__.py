"""fastpg beside other libraries. Nothing here is imported by `import fastpg`."""
