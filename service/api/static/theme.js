// Before anything is painted: the theme that was chosen here, if one was. A classic script, since modules come later.
"use strict";

(function () {
  const chosen = localStorage.getItem("labelgrid.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
})();
