// Sets the chosen theme before the first paint. A classic script, because modules run later.
"use strict";

(function () {
  try {
    const chosen = localStorage.getItem("labelgrid.theme");
    if (chosen) document.documentElement.dataset.theme = chosen;
  } catch {} // the browser blocks it
})();
