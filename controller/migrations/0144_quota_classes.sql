-- What is said of all projects that have no limit of their own. The only class is 'default'.
CREATE TABLE quota_classes (
    class      TEXT   NOT NULL,
    resource   TEXT   NOT NULL,
    hard_limit BIGINT NOT NULL, -- -1: none
    PRIMARY KEY (class, resource)
);
