"""Which addresses make the retrieved channel worth having? (docs/addresses.md)"""
