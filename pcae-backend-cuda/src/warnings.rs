//! What is not as it should be, though everything works: kept to be told once.

/// Texts, each there once, and how many of them were told.
#[derive(Debug, Default)]
pub(crate) struct Warnings {
    all: Vec<String>,
    told: usize,
}

impl Warnings {
    /// Keeps a text that is not there yet.
    pub(crate) fn add(&mut self, text: String) {
        if !self.all.contains(&text) {
            self.all.push(text);
        }
    }

    /// The next one that was not told.
    pub(crate) fn next(&mut self) -> Option<&str> {
        let text = self.all.get(self.told)?;
        self.told += 1;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::Warnings;

    #[test]
    fn each_is_told_once_in_the_order_in_which_it_came() {
        let mut warnings = Warnings::default();
        assert_eq!(warnings.next(), None);
        for text in ["a", "b", "a"] {
            warnings.add(text.to_owned());
        }
        assert_eq!(warnings.next(), Some("a"));
        warnings.add("a".to_owned());
        warnings.add("c".to_owned());
        assert_eq!(warnings.next(), Some("b"));
        assert_eq!(warnings.next(), Some("c"));
        assert_eq!(warnings.next(), None);
    }
}
