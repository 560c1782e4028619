//! Guest images made on this machine from Debian packages.
