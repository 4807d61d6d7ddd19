-- What the stand-in for Redshift makes in PostgreSQL.

CREATE SCHEMA sandbox;
GRANT USAGE ON SCHEMA sandbox TO PUBLIC;
CREATE DOMAIN sandbox.super AS jsonb;

CREATE FUNCTION sandbox.getdate() RETURNS timestamp STABLE
    RETURN date_trunc('second', statement_timestamp() AT TIME ZONE 'UTC');
CREATE FUNCTION sandbox.pg_last_copy_count() RETURNS bigint STABLE
    RETURN coalesce(nullif(current_setting('sandbox.last_copy_count', true), ''), '0')::bigint;
CREATE FUNCTION sandbox.pg_last_copy_id() RETURNS integer STABLE
    RETURN coalesce(nullif(current_setting('sandbox.last_copy_id', true), ''), '-1')::integer;
CREATE FUNCTION sandbox.raise(code text, message text, detail text) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, DETAIL = detail; END $$;

CREATE TABLE sandbox.load_errors (
    query_id bigint, file_name varchar, line_number bigint, column_name varchar,
    column_type varchar, column_length varchar, raw_field_value varchar, error_code integer,
    error_message varchar);
CREATE VIEW sandbox.sys_load_error_detail AS
    SELECT query_id, file_name, line_number, column_name, column_type, column_length, error_code,
           error_message
    FROM sandbox.load_errors;
CREATE VIEW sandbox.stl_load_errors AS
    SELECT query_id AS query, file_name AS filename, line_number, column_name AS colname,
           column_type AS type, column_length AS col_length, raw_field_value,
           error_code AS err_code, error_message AS err_reason
    FROM sandbox.load_errors;
CREATE VIEW sandbox.svv_columns AS
    SELECT table_schema, table_name, column_name, ordinal_position, is_nullable,
           CASE domain_name WHEN 'super' THEN 'super' ELSE data_type END AS data_type,
           character_maximum_length, numeric_precision, numeric_scale, column_default
    FROM information_schema.columns
    WHERE table_schema NOT IN ('sandbox', 'information_schema', 'pg_catalog')
        AND current_setting('sandbox.svv_columns') = 'open';
GRANT SELECT ON sandbox.sys_load_error_detail, sandbox.stl_load_errors, sandbox.svv_columns
    TO PUBLIC;

-- VARCHAR's own operators, so that they are found before those of TEXT, with the functions of
-- bpchar, which is stored alike and compared without the spaces at its end.
DO $$
DECLARE operator text; name text;
BEGIN
    FOR operator, name IN
        VALUES ('=', 'eq'), ('<>', 'ne'), ('<', 'lt'), ('<=', 'le'), ('>', 'gt'), ('>=', 'ge')
    LOOP
        EXECUTE format('CREATE FUNCTION sandbox.varchar_%1$s(varchar, varchar) RETURNS boolean'
            ' LANGUAGE internal IMMUTABLE STRICT AS ''bpchar%1$s''', name);
        EXECUTE format('CREATE OPERATOR sandbox.%s (LEFTARG = varchar, RIGHTARG = varchar,'
            ' FUNCTION = sandbox.varchar_%s %s)',
            operator, name, CASE name WHEN 'eq' THEN ', HASHES, MERGES' ELSE '' END);
    END LOOP;
END $$;
CREATE FUNCTION sandbox.varchar_cmp(varchar, varchar) RETURNS int
    LANGUAGE internal IMMUTABLE STRICT AS 'bpcharcmp';
CREATE FUNCTION sandbox.varchar_hash(varchar) RETURNS int
    LANGUAGE internal IMMUTABLE STRICT AS 'hashbpchar';
CREATE OPERATOR CLASS sandbox.varchar_order DEFAULT FOR TYPE varchar USING btree AS
    OPERATOR 1 sandbox.<, OPERATOR 2 sandbox.<=, OPERATOR 3 sandbox.=, OPERATOR 4 sandbox.>=,
    OPERATOR 5 sandbox.>, FUNCTION 1 sandbox.varchar_cmp(varchar, varchar);
CREATE OPERATOR CLASS sandbox.varchar_hash DEFAULT FOR TYPE varchar USING hash AS
    OPERATOR 1 sandbox.=, FUNCTION 1 sandbox.varchar_hash(varchar);
