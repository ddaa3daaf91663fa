// The only place where markup becomes nodes. DOMPurify decides what may stay; everything else here builds nodes itself.

import DOMPurify from "./vendor/purify.js";

// What markdown can mean, and no more. No id, name, class, style: a reply cannot shadow our names or dress as the page.
const PROSE = {
  ALLOWED_TAGS: [
    "a",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "li",
    "ol",
    "p",
    "pre",
    "strong",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
  ],
  ALLOWED_ATTR: ["href", "start", "align", "lang"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["start", "align", "lang"], // not addresses, so the line above is not about them
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const HIGHLIGHTED = {
  ALLOWED_TAGS: ["span"],
  ALLOWED_ATTR: ["class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** A fragment of safe nodes. Links show where they lead, and open beside the page without a way back into it. */
export function sanitizeProse(html) {
  const fragment = DOMPurify.sanitize(html, PROSE);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes); // an address that was refused leaves its words
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer";
    link.title = link.href;
  }
  return fragment;
}

export const sanitizeHighlighted = (html) => DOMPurify.sanitize(html, HIGHLIGHTED);
