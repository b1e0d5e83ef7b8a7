"""A page as a browser meets it: tags closed in order, nothing fetched, drawings that are XML."""

import re
import xml.dom.minidom
from html.parser import HTMLParser

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Collects the text, the tags and the drawings of a page, and checks that it stands alone."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
        found = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
        self.drawings = [xml.dom.minidom.parseString(svg).documentElement for svg in found]

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "srcset"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def all(self):
        return " ".join(self.text)
